"""What is found by trying is found once a run: by the first rank, whatever becomes of it; the others adopt it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import World, make_shards, tree_bytes

from geoloc_batch.errors import OutputError, StopRequested
from geoloc_batch.model import encoder as encoder_module
from geoloc_batch.model import settling
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.run import first_rank
from geoloc_batch.run.encoders import adopt_settings, left_open
from geoloc_batch.run.first_rank import agreed

CPU = torch.device("cpu")
RUN = {
    "layout": 1,
    "config": {"batch_size": 6, "sdpa": "math", "compile": True, "compile_mode": "default", "precision": "fp32"},
}

# Takes the turn as a rank that tries batches out, and never ends by itself.
HOLD_PROGRAM = """
import fcntl, sys, time
lock = open(sys.argv[1], "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""

# A rank on a device that is measured, which says so whenever it searches, and takes its time.
RANK_PROGRAM = """
import os, sys, time
from geoloc_batch.cli import main
from geoloc_batch.model import encoder, settling
from geoloc_batch.run import first_rank
encoder.is_measured = first_rank.is_measured = lambda _: True
def search(try_out, *, device):
    with open(sys.argv[1], "a") as said:
        said.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[2]))
    return 6
settling.largest_that_fits = search
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU where things are found by trying, as on CUDA; gives what was searched."""
    done: list[str] = []
    for module in (encoder_module, first_rank):
        monkeypatch.setattr(module, "is_measured", lambda _: True)
    monkeypatch.setattr(settling, "largest_that_fits", lambda *_, **__: done.append("batch size") or 6)
    monkeypatch.setattr(settling, "choose_sdpa", lambda *_, **__: done.append("attention") or "math")
    return done


def pinned(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "run.json").read_text())["config"]
    return config


def test_a_resumed_run_adopts_what_the_first_one_found_without_searching_or_loading_twice(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, searches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load_clip = encoder_module.load_clip
    monkeypatch.setattr(encoder_module, "load_clip", lambda name: loads.append(name) or load_clip(name))
    shards = make_shards(tmp_path / "shards", [5, 7])
    flags = ["--encoder", world.checkpoint, "--out", tmp_path / "out"]
    assert geoloc("embed", shards[0], *flags)[0] == 0
    assert searches == ["attention", "batch size"]
    found = pinned(tmp_path / "out")
    assert (found["batch_size"], found["sdpa"], found["compile_mode"]) == (6, "math", "default")
    # Whatever it would find now.
    monkeypatch.setattr(settling, "largest_that_fits", None)
    monkeypatch.setattr(settling, "choose_sdpa", None)
    assert geoloc("embed", *shards, *flags)[0] == 0
    assert geoloc("verify", tmp_path / "out")[0] == 0
    assert len(loads) == 2
    # The same as a run that was told all of it.
    told = ["--batch-size", 6, "--sdpa", "math", "--encoder", world.checkpoint, "--out", tmp_path / "told"]
    assert geoloc("embed", *shards, *told)[0] == 0
    # The plan of the one that shards were added to has two parts.
    for path, found in tree_bytes(tmp_path / "told").items():
        assert path == "plan.parquet" or (tmp_path / "out" / path).read_bytes() == found


@pytest.mark.parametrize("mode", ["auto", "default", "max-autotune-no-cudagraphs"])
def test_the_same_command_goes_on_whatever_mode_it_asks_for_where_nothing_is_compiled(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    shards = make_shards(tmp_path / "shards", [3, 2])
    flags = ["--out", tmp_path / "out", "--compile-mode", mode, *world.encoder_flags]
    assert geoloc("embed", shards[0], *flags)[0] == 0
    assert pinned(tmp_path / "out")["compile_mode"] == "default"
    assert geoloc("embed", *shards, *flags)[0] == 0


def test_a_lock_that_cannot_be_opened_costs_a_search_and_no_run(tmp_path: Path, searches: list[str]) -> None:
    (tmp_path / "out" / "_logs" / "first_rank.lock").mkdir(parents=True)
    with agreed(EncoderConfig(), tmp_path / "out", CPU, lambda: False) as settings:
        assert settings == EncoderConfig()


def test_a_setting_that_is_given_and_differs_is_refused_and_so_is_a_run_that_pinned_none(
    world: World, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    from geoloc_batch.cli import main

    flags = ["embed", str(world.shards), "--out", str(tmp_path / "out"), *world.encoder_flags]
    assert main(flags) == 0
    assert 'sdpa is pinned to "default", now "math"' in refusal([*flags, "--sdpa", "math"])
    # As the versions before that setting left it.
    config = pinned(tmp_path / "out")
    del config["sdpa"]
    (tmp_path / "out" / "run.json").write_text(json.dumps({**RUN, "config": config}))
    for given in ([], ["--sdpa", "default"]):
        assert "begun by an earlier version of geoloc, which did not pin sdpa" in refusal([*flags, *given])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("batch_size", "x", 'pins batch_size to "x", which no run does: it is a whole number above 0'),
        ("batch_size", 0, "pins batch_size to 0"),
        ("batch_size", True, "pins batch_size to true"),
        ("compile", "no", 'pins compile to "no", which no run does: it is true or false'),
        ("precision", "auto", 'pins precision to "auto", which no run does: it is one of fp32, bf16, fp16, fp8;'),
        ("compile_mode", None, "pins compile_mode to null"),
        ("sdpa", ["math"], 'pins sdpa to ["math"], which no run does: it is one of default, flash'),
    ],
)
def test_a_pinned_setting_that_somebody_has_changed_by_hand_is_told(
    world: World, tmp_path: Path, refusal: Callable[..., str], name: str, value: object, told: str
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**RUN, "config": {**RUN["config"], name: value}}))  # type: ignore[dict-item]
    said = refusal(["embed", str(world.shards), "--out", str(tmp_path), "--encoder", str(world.checkpoint)])
    assert f"{path} {told}" in said
    assert "put back what stood there, or give another --out" in said


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A rank that found nothing yet, in a process of its own."""
    (tmp_path / "out" / "_logs").mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_PROGRAM, tmp_path / "out" / "_logs" / "first_rank.lock"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def waiting(out: Path, **how: Any) -> tuple[threading.Thread, list[EncoderConfig]]:
    """A rank that comes second, in a thread, and what it is told to load."""
    told: list[EncoderConfig] = []

    def come() -> None:
        with agreed(EncoderConfig(), out, CPU, lambda: False, **how) as settings:
            told.append(settings)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    return thread, told


def test_who_comes_second_waits_for_what_is_pinned(tmp_path: Path, holder: Any, searches: list[str]) -> None:
    thread, told = waiting(tmp_path / "out")
    time.sleep(0.5)
    assert told == []
    (tmp_path / "out" / "run.json").write_text(json.dumps(RUN))
    thread.join(30)
    assert told == [EncoderConfig(batch_size=6, sdpa="math", compile="on", compile_mode="default", precision="fp32")]
    assert holder.poll() is None


def test_a_killed_first_rank_blocks_nobody(tmp_path: Path, holder: Any, searches: list[str]) -> None:
    thread, told = waiting(tmp_path / "out")
    time.sleep(0.5)
    assert told == []
    holder.send_signal(signal.SIGKILL)
    thread.join(30)
    # It finds for itself.
    assert told == [EncoderConfig()]


def test_a_first_rank_that_hangs_is_not_waited_for_for_ever_and_a_stop_is_heard(
    tmp_path: Path, holder: Any, searches: list[str]
) -> None:
    thread, told = waiting(tmp_path / "out", wait_s=0.3)
    thread.join(30)
    assert told == [EncoderConfig()]
    with pytest.raises(StopRequested), agreed(EncoderConfig(), tmp_path / "out", CPU, lambda: True):
        pass
    assert holder.poll() is None


def test_nobody_waits_where_nothing_is_left_open_or_nothing_is_measured(
    tmp_path: Path, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = EncoderConfig(batch_size=4, sdpa="flash")
    with agreed(EncoderConfig(), tmp_path / "out", CPU, lambda: True) as settings:
        assert settings == EncoderConfig()
    monkeypatch.setattr(first_rank, "is_measured", lambda _: True)
    with agreed(given, tmp_path / "out", CPU, lambda: True) as settings:
        assert settings == given
    assert holder.poll() is None


def test_a_folder_that_is_none_of_ours_gets_nothing_of_ours(tmp_path: Path, searches: list[str]) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with (
        pytest.raises(OutputError, match=r"holds 'letter\.txt'"),
        agreed(EncoderConfig(), tmp_path, CPU, lambda: False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="not written by geoloc"), agreed(EncoderConfig(), tmp_path, CPU, lambda: 0):  # type: ignore[arg-type,return-value]
        pass


def test_what_is_given_is_never_adopted_and_what_an_older_run_did_not_pin_stays_open() -> None:
    assert left_open(EncoderConfig()) == ["precision", "compile", "compile_mode", "sdpa", "batch_size"]
    given = EncoderConfig(precision="bf16", compile="off", sdpa="flash", batch_size=9)
    assert left_open(given) == ["compile_mode"]
    assert adopt_settings(given, RUN["config"]) == EncoderConfig(  # type: ignore[arg-type]
        precision="bf16", compile="off", sdpa="flash", batch_size=9, compile_mode="default"
    )
    assert adopt_settings(EncoderConfig(), {"batch_size": 6}) == EncoderConfig(batch_size=6)


@pytest.mark.slow
def test_of_ranks_that_start_together_one_searches_and_a_killed_one_blocks_nobody(world: World, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", [5, 3, 9, 4])
    said, out = tmp_path / "said", tmp_path / "out"
    said.touch()

    def rank(seconds: float) -> subprocess.Popen[bytes]:
        arguments = ["embed", tmp_path / "shards", "--out", out, "--encoder", world.checkpoint]
        return subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, said, str(seconds), *map(str, arguments)], stdout=subprocess.DEVNULL
        )

    def searched() -> list[int]:
        return [int(line) for line in said.read_text().split()]

    lost = rank(600)
    end = time.monotonic() + 120
    while not searched() and time.monotonic() < end:
        time.sleep(0.05)
    assert searched() == [lost.pid]
    others = [rank(2) for _ in range(3)]
    # Nobody else searches while it lives.
    with open(out / "_logs" / "first_rank.lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    time.sleep(1)
    os.kill(lost.pid, signal.SIGKILL)
    lost.wait()
    assert [process.wait(timeout=300) for process in others] == [0, 0, 0]
    assert len(searched()) == 2
    assert pinned(out)["batch_size"] == 6
