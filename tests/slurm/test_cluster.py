"""The cluster itself: whatever ends the tests, nothing of it is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import processes_of, why_absent

pytestmark = pytest.mark.slurm

OWNER = """
import signal, sys, time
# Who started the tests in the background of a shell has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from cluster import Cluster
with Cluster() as cluster:
    cluster.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
    cluster.wait(lambda: " R " in cluster.run("squeue"), 90, "a job")
    print(cluster.folder, flush=True)
    time.sleep(1000)
"""


def wait_until(is_met: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_met() and time.monotonic() < end:
        time.sleep(0.05)
    assert is_met()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_cluster_whose_owner_ended(number: signal.Signals) -> None:
    if reason := why_absent():
        pytest.skip(reason)
    command = [sys.executable, "-c", OWNER, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        try:
            told = owner.stdout.readline().strip()
            assert told, "the owner has ended, or was never given a job"
            folder = Path(told)
            # A job runs a little before its first process does.
            wait_until(lambda: len(list(processes_of(folder))) >= 6)
            owner.send_signal(number)
            owner.wait(timeout=30)
        finally:
            owner.kill()
    wait_until(lambda: not folder.exists() and not list(processes_of(folder)))
