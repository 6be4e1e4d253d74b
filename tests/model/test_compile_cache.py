"""The compile cache: later processes start from it, one compiles while others wait, no run fails by it."""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from geoloc_batch.errors import ConfigError, StopRequested
from geoloc_batch.model import fp8
from geoloc_batch.model.compile_cache import cache_root, compiling, graph_folder, is_finished
from geoloc_batch.model.config import EncoderConfig, WarmupConfig
from geoloc_batch.model.encoder import Encoder, load_encoder
from geoloc_batch.model.warmup import warm_up

ROOT = Path(__file__).resolve().parents[2]

# Compiles one matrix product, which takes no C++ compiler. The first process that gets there takes its time.
COMPILE_PROGRAM = """
import json, sys, time, torch, torch._dynamo
from pathlib import Path
from torch._dynamo.utils import counters
from geoloc_batch.model.compile_cache import compiling
folder, meeting = Path(sys.argv[1]), Path(sys.argv[2])
(meeting / sys.argv[3]).touch()
while len(list(meeting.iterdir())) < int(sys.argv[4]):
    time.sleep(0.01)
run = torch.compile(torch.nn.Linear(16, 16, bias=False), fullgraph=True, dynamic=False)
with torch.inference_mode(), compiling(folder, {"what": "a product"}):
    run(torch.ones(3, 16))
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]]))
"""

HOLD_PROGRAM = """
import fcntl, sys, time
lock = open(sys.argv[1], "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def said(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_of_two_processes_at_once_one_compiles_and_the_other_starts_from_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    both = [start("-c", COMPILE_PROGRAM, tmp_path / "cache" / "graph", tmp_path / "meeting", name, 2) for name in "ab"]
    assert sorted(map(said, both)) == [[0, 1], [1, 0]]
    assert is_finished(tmp_path / "cache" / "graph")


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that seems to compile for `tmp_path`, and never ends by itself."""
    process = start("-c", HOLD_PROGRAM, tmp_path / "compiling.lock")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_lock_of_a_killed_compiler_is_taken_over(tmp_path: Path, holder: Any) -> None:
    entered = threading.Event()

    def compile_it() -> None:
        with compiling(tmp_path, {}):
            entered.set()

    waiter = threading.Thread(target=compile_it, daemon=True)
    waiter.start()
    assert not entered.wait(1)
    holder.send_signal(signal.SIGKILL)
    assert entered.wait(30)
    waiter.join()
    assert is_finished(tmp_path)


def test_a_compiler_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, holder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with compiling(tmp_path, {}, wait_s=0.5):
        assert time.monotonic() - started >= 0.5
    assert "has been compiling in" in caplog.text
    assert holder.poll() is None


def test_who_is_asked_to_stop_does_not_wait_for_another_compiler(
    tmp_path: Path, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "graph_folder", lambda _: tmp_path)
    options: dict[str, Any] = {"batch_size": 2, "device": "cpu", "precision": "bf16", "compile": "on"}
    encoder = load_encoder("demo", **options)
    asked_s: list[float] = []
    started = time.monotonic()
    encoder.is_stopped = lambda: asked_s.append(time.monotonic() - started) or asked_s[-1] > 0.5  # type: ignore[func-returns-value]
    with pytest.raises(StopRequested):
        encoder.encode(torch.zeros(2, 3, 56, 56, dtype=torch.uint8))
    assert len(asked_s) > 1
    assert asked_s[-1] < 30
    # Who stands in for it, at another precision, is asked to stop with it.
    assert encoder.at_precision("fp32").is_stopped is encoder.is_stopped
    assert holder.poll() is None


def test_a_filesystem_without_locks_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with caplog.at_level(logging.INFO), compiling(tmp_path, {}, wait_s=600):
        pass
    assert f"{tmp_path} has no locks (No locks available): every process is compiling" in caplog.text
    assert is_finished(tmp_path)


def test_nobody_waits_for_a_graph_that_is_finished(tmp_path: Path, holder: Any) -> None:
    (tmp_path / "finished.json").write_text("{}")
    with compiling(tmp_path, {}, wait_s=600):
        assert holder.poll() is None


def test_a_compilation_that_fails_leaves_no_mark_and_the_environment_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)

    def fail() -> None:
        with compiling(tmp_path, {}):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
            assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
            raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        fail()
    assert not is_finished(tmp_path)
    assert dict(os.environ) == before


def test_a_folder_that_cannot_be_written_is_warned_of_and_the_encoder_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch, "compile", lambda tower, **_: tower)
    options: dict[str, Any] = {"batch_size": 2, "device": "cpu", "precision": "fp32"}
    encoder = load_encoder("demo", compile="on", compile_cache=str(tmp_path / "file" / "below"), **options)
    pixels = torch.ones(2, 3, 56, 56, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        features = encoder.encode(pixels)
    assert f"--compile-cache {tmp_path}/file/below cannot be used (Not a directory)" in caplog.text
    assert torch.equal(features, load_encoder("demo", **options).encode(pixels))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_seen_before_the_compiler_meets_it(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    before = dict(os.environ)
    with compiling(tmp_path, {}):
        assert dict(os.environ) == before
    assert f"cannot be used ({os.strerror(number)})" in caplog.text
    assert not is_finished(tmp_path)


def folder_of(cache: str = "/c", **options: Any) -> Path | None:
    usual: dict[str, Any] = {"batch_size": 2, "device": "cpu", "precision": "fp32", "compile": "on"}
    return load_encoder("demo", compile_cache=cache, **(usual | options)).graph_folder()


def test_a_graph_has_a_folder_by_everything_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = folder_of()
    assert usual is not None
    assert usual.parent == Path("/c")
    assert folder_of() == usual
    assert folder_of(compile="off") is None
    assert folder_of("off") is None
    others = [folder_of(batch_size=3), folder_of(precision="bf16"), folder_of(tap="projected")]
    others += [folder_of(sdpa="math"), folder_of(compile_mode="max-autotune-no-cudagraphs")]
    monkeypatch.setattr(torch, "__version__", "9.9")
    others.append(folder_of())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    others.append(folder_of())
    assert len({usual, *others}) == 8


def test_towers_of_one_shape_with_other_settings_have_other_folders() -> None:
    def facts(encoder: Encoder) -> Path:
        found = encoder.graph_facts()
        assert set(found) == {
            *("torch", "triton", "device", "architecture", "batch_size", "precision", "sdpa", "compile_mode")
        }
        return graph_folder(Path("/c"), found)

    encoder = load_encoder("demo", batch_size=2, device="cpu", precision="fp32")
    before = facts(encoder)
    layer: Any = encoder.tower.layers[0]  # type: ignore[union-attr,index]
    layer.num_heads *= 2
    assert facts(encoder) != before


def test_a_graph_in_fp8_depends_on_the_code_of_its_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoloc_batch.model.encoder.check_precision", lambda *_: None)
    usual: Any = {"precision": "fp8", "compile": "on", "batch_size": 2, "device": "cpu"}
    eight, sixteen = (load_encoder("demo", **usual | how) for how in ({}, {"precision": "bf16"}))
    before = [encoder.graph_facts()["architecture"] for encoder in (eight, sixteen)]
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + "#" * (module is fp8))
    after = [encoder.graph_facts()["architecture"] for encoder in (eight, sixteen)]
    assert (after[0] == before[0], after[1] == before[1]) == (False, True)


def test_the_cache_lies_below_the_users_own_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_root("") == Path("/caches/geoloc_batch/compile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root("") == Path("/home/me/.cache/geoloc_batch/compile")
    assert cache_root("given") == Path.cwd() / "given"
    assert cache_root("off") is None


def test_what_leaves_nothing_to_warm_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--compile off leaves nothing to warm up"):
        WarmupConfig(encoder=EncoderConfig(compile="off"))
    with pytest.raises(ConfigError, match="--compile-cache off leaves nothing to warm up"):
        WarmupConfig(encoder=EncoderConfig(compile_cache="off"))
    monkeypatch.setattr(torch, "compile", lambda tower, **_: tower)
    (tmp_path / "file").touch()
    encoder = EncoderConfig(encoder="demo", batch_size=2, compile_cache=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="was not filled; name a folder that can be written"):
        warm_up(WarmupConfig(encoder=encoder), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_warm_up_is_what_later_processes_start_from(tmp_path: Path, precision: str) -> None:
    flags = ["--encoder", "demo", "--batch-size", 3, "--precision", precision, "--compile-cache", tmp_path]
    first, second = (said(start("-m", "geoloc_batch", "warmup", *flags)) for _ in range(2))
    assert (first["was_warm"], second["was_warm"]) == (False, True)
    assert second["seconds"] < first["seconds"]
    # What a run would do: the same flags in a process that says what the compiler found.
    program = (
        "import sys, json, torch\n"
        "from torch._dynamo.utils import counters\n"
        "from geoloc_batch.model.encoder import load_encoder\n"
        "encoder = load_encoder('demo', batch_size=3, precision=sys.argv[1], compile='on', compile_cache=sys.argv[2])\n"
        "encoder.encode(torch.zeros(3, 3, 56, 56, dtype=torch.uint8))\n"
        "print(json.dumps([counters['inductor']['fxgraph_cache_miss'], counters['inductor']['fxgraph_cache_hit']]))\n"
    )
    misses, hits = said(start("-c", program, precision, tmp_path))
    assert (misses, hits) == (0, 1)
