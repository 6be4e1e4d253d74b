"""One compiled graph for a whole run, whatever its shards and heads are, and for one that goes on where it stopped."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import World, make_head, make_shards, predictions

from geoloc_batch.cli import main
from geoloc_batch.model.encoder import load_encoder

# Embeds, and says at the end what the compiler had to make and what it found.
EMBED_PROGRAM = """
import json, sys
from torch._dynamo.utils import counters
from geoloc_batch.cli import main
code = main(sys.argv[1:])
found = counters["inductor"]
print(json.dumps([code, found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]]))
"""


def test_ragged_shards_two_heads_and_a_resume_take_one_graph(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    torch._dynamo.reset()
    shards = make_shards(tmp_path / "shards", [3, 9, 1, 6])
    other, other_cells = make_head(tmp_path / "other", num_cells=11, seed=1)
    heads = ["--head", f"a={world.head}", "--head", f"b={other}", "--cells", world.cells, "--cells", other_cells]
    flags = [*heads, *world.encoder_flags, "--compile", "on", "--compile-cache", "off", "--precision", "fp32"]
    # Shards that were added go on where the first ones ended.
    for given in (shards[:2], shards):
        code, summary = geoloc("predict", *given, "--out", tmp_path / "out", *flags)
        assert (code, summary["errors"]) == (0, 0)
    assert len(graphs) == 1
    assert [len(predictions(tmp_path / "out", tree)) for tree in "ab"] == [19, 19]
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert (config["compile"], config["compile_mode"], config["sdpa"]) == (True, "default", "default")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.mark.slow
def test_of_two_runs_at_once_on_an_empty_cache_one_compiles(world: World, tmp_path: Path) -> None:
    flags = [*world.encoder_flags, "--precision", "fp32", "--compile", "on", "--compile-cache", tmp_path / "cache"]
    both = [start("-c", EMBED_PROGRAM, "embed", world.shards, "--out", tmp_path / name, *flags) for name in "ab"]
    said = [json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in both]
    assert sorted(said) == [[0, 0, 1], [0, 1, 0]]
    assert [main(["verify", str(tmp_path / name)]) for name in "ab"] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_run_that_waits_for_another_compiler_ends_when_it_is_asked_to(
    world: World, tmp_path: Path, number: signal.Signals
) -> None:
    import fcntl

    encoder = load_encoder(
        str(world.checkpoint), batch_size=8, precision="fp32", compile="on", compile_cache=str(tmp_path), device="cpu"
    )
    folder = encoder.graph_folder()
    assert folder is not None
    folder.mkdir()
    with open(folder / "compiling.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        flags = [*world.encoder_flags, "--precision", "fp32", "--compile", "on", "--compile-cache", tmp_path]
        process = start("-m", "geoloc_batch", "embed", world.shards, "--out", tmp_path / "out", *flags)
        assert process.stderr is not None
        for line in process.stderr:
            if "waiting for another process that is compiling" in line:
                break
        asked = time.monotonic()
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - asked < 30
    assert process.returncode == 75
    assert json.loads(out.splitlines()[-1])["rows"] == 0
    assert list((tmp_path / "out" / "_leases").glob("0*")) == []
