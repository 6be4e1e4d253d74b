"""Runs that are killed, asked to stop, or share a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_world import (
    World,
    make_shards,
    tree_bytes,
    wait_for,
)
from store_samples import crowd

from geoloc_batch.cli import main
from geoloc_batch.run import drive as drive_room
from geoloc_batch.store import ledger as ledger_room
from geoloc_batch.store.ledger import Execution, Ledger


def test_a_killed_run_resumes_and_equals_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, [6] * 12)
    arguments = ["embed", str(shards), *world.encoder_flags]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "geoloc_batch", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list((out / "_done").rglob("*.json"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list((out / "_done").rglob("*.json")))
    assert main([*arguments, "--out", str(out)]) == 0
    assert done >= 2
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_sigterm_ends_with_75_and_the_next_run_completes(world: World, tmp_path: Path) -> None:
    # A pipe that never ends after its first photos keeps the run busy until the signal comes.
    shard = make_shards(tmp_path / "shards", [3])[0]
    out = tmp_path / "out"
    arguments = ["embed", str(shard), f"pipe:cat {shard}; sleep 60", "--out", str(out), *world.encoder_flags]
    process = subprocess.Popen([sys.executable, "-m", "geoloc_batch", *arguments], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(list((out / "_leases").glob("*"))) >= 2, process)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert json.loads(stdout.splitlines()[-1])["units"] == 2
    assert main(["verify", str(out)]) == 1


@pytest.mark.slow
def test_sigterm_ends_a_run_that_waits_for_a_stalled_pipe_and_the_pipe_with_it(world: World, tmp_path: Path) -> None:
    shard = make_shards(tmp_path / "shards", [3])[0]
    out, mark = tmp_path / "out", f"61.{os.getpid()}"
    arguments = ["embed", f"pipe:cat {shard}; sleep {mark}", "--out", str(out), *world.encoder_flags]
    process = subprocess.Popen([sys.executable, "-m", "geoloc_batch", *arguments], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list((out / "_leases").glob("000000.*"))) >= 1, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 75
    assert list((out / "_leases").glob("000000.*")) == []
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if mark.encode() in line and b"sleep" in line]


def test_a_signal_while_the_parts_are_loaded_ends_with_75_too(world: World, tmp_path: Path) -> None:
    arguments = ["embed", str(world.shards), "--out", str(tmp_path / "out"), *world.encoder_flags]
    script = (
        "import os, signal, sys\n"
        "from geoloc_batch.run import encoders\n"
        "encoders.load_encoder = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from geoloc_batch.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_on_one_folder_write_each_key_once(world: World, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, [6] * 10)
    arguments = ["embed", str(shards), *world.encoder_flags]
    command = [sys.executable, "-m", "geoloc_batch", *arguments, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert main(["verify", str(tmp_path / "two")]) == 0
    assert set(tree_bytes(tmp_path / "two")) == set(tree_bytes(tmp_path / "one"))


def test_a_stopped_run_of_very_many_units_tells_what_it_has_done_itself(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    for room in (ledger_room, drive_room):
        monkeypatch.setattr(room, "MANY_UNITS", 3)
    make_shards(tmp_path / "shards", [3 + number % 4 for number in range(24)])
    commit, rows = Ledger.commit, list[int]()

    def commit_and_be_stopped(self: Ledger, execution: Execution, *given: Any, **named: Any) -> bool:
        has_won = commit(self, execution, *given, **named)
        rows.append(given[1].rows)
        signal.raise_signal(signal.SIGTERM)
        return has_won

    monkeypatch.setattr(Ledger, "commit", commit_and_be_stopped)
    num_before = 0
    for _ in range(2):
        rows.clear()
        caplog.clear()
        assert main(["embed", str(tmp_path / "shards"), "--out", str(tmp_path / "out"), *world.encoder_flags]) == 75
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (summary["units"], summary["rows"], summary["samples"]) == (24, sum(rows), sum(rows))
        num_before += len(rows)
        assert f"those of this process: there is no time to read {num_before} markers" in caplog.text


def test_who_is_stopped_while_another_clears_up_at_the_end_ends_with_75(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    crowd(monkeypatch)
    make_shards(tmp_path / "shards", [3] * 5)
    out = tmp_path / "out"
    claim = out / "_sums" / "total.5.claim"
    acquire = Ledger.acquire

    def acquire_and_be_stopped(self: Ledger) -> Execution | Any:
        # Of a process that has begun to clear up.
        claim.parent.mkdir(exist_ok=True)
        claim.touch()
        found = acquire(self)
        if found == "wait" and len(list((out / "_done").rglob("*.json"))) == 5:
            # To the main thread, which may be waiting for this one.
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    arguments = ["embed", str(tmp_path / "shards"), "--out", str(out), *world.encoder_flags]
    with monkeypatch.context() as stopped:
        stopped.setattr(Ledger, "acquire", acquire_and_be_stopped)
        assert main(arguments) == 75
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["units"], summary["rows"]) == (5, 15)
    assert "another process was clearing up" in caplog.text
    claim.unlink()
    assert main(arguments) == 0
