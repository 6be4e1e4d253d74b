"""Rank, device and signals of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from geoloc_batch.errors import StopRequested
from geoloc_batch.run.workers import StopSignal, this_worker


@pytest.fixture(autouse=True)
def keep_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_a_launcher_there_is_one_rank() -> None:
    worker = this_worker()
    assert (worker.rank, worker.world_size) == (0, 1)
    assert worker.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (3, 1, 8)),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "2", "SLURM_NTASKS": "16"}, (5, 2, 16)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "7", "SLURM_NTASKS": "9"}, (1, 0, 2)),
    ],
)
def test_the_rank_comes_from_the_launcher_without_joining_a_process_group(
    names: dict[str, str], expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    worker = this_worker()
    assert (worker.rank, worker.local_rank, worker.world_size) == expected
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("names", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_PER_TASK": "64"}, 8),
        ({"SLURM_CPUS_PER_TASK": "3", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_ranks_of_one_machine_share_its_cpus(
    names: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geoloc_batch.run.workers.usable_cpus", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", **names}.items():
        monkeypatch.setenv(name, value)
    this_worker()
    assert torch.get_num_threads() == threads


def test_a_signal_said_twice_counts_once_and_a_later_one_ends_the_process() -> None:
    script = (
        "import os, signal, sys, time\n"
        "from geoloc_batch.run import workers\n"
        "with workers.StopSignal() as stop:\n"
        "    stop.defer()\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.is_set(), flush=True)\n"
        "    time.sleep(workers._ECHO_S)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("True\n", -signal.SIGTERM)


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_asks_for_a_stop_and_the_handlers_go_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.defer()
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
        assert stop.wait(10)
    assert signal.getsignal(number) is before


def test_a_signal_raises_while_there_is_nothing_to_finish() -> None:
    with StopSignal() as stop, pytest.raises(StopRequested):
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()


def test_what_is_to_be_done_on_a_stop_is_done_once_and_only_then() -> None:
    calls: list[str] = []
    stop = StopSignal()
    with stop.calling(lambda: calls.append("first")):
        pass
    with stop.calling(lambda: calls.append("second")):
        stop.set()
        for _ in range(200):
            if calls:
                break
            time.sleep(0.01)
    assert calls == ["second"]
