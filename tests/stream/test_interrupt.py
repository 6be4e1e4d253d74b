"""Closing a stream that waits for somebody: at once, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from batch_samples import threads
from interrupt_samples import LONG, Waiting, children, sleepers, until
from stream_samples import Reading, numbered, tar_bytes, unit_of, write_tar

from geoloc_batch.stream import backoff as backoff_module
from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.samples import UnitReader


@pytest.mark.parametrize(
    "command",
    [
        "touch {begun}; sleep {long}",
        "touch {begun}; sleep {long} & sleep {long}",
        "cat {shard}; touch {begun}; sleep {long}",
        "cat {shard}; exec >&-; touch {begun}; sleep {long}",
        "(trap '' TERM HUP INT; touch {begun}; sleep {long}; sleep {long}) | cat",
    ],
)
def test_close_ends_a_command_and_all_that_it_started(tmp_path: Path, command: str) -> None:
    begun, shard = tmp_path / "begun", write_tar(tmp_path / "a.tar", numbered(3))
    waiting = Waiting("pipe:" + command.format(begun=begun, shard=shard, long=LONG))
    until(begun.exists)
    until(sleepers)
    time.sleep(0.1)
    waiting.close()
    until(lambda: not sleepers())


def test_close_does_not_wait_for_what_a_command_has_put_out_of_reach(tmp_path: Path) -> None:
    waiting = Waiting(f"pipe:setsid sleep {LONG} & sleep {LONG}")
    until(lambda: len(sleepers()) == 2)
    waiting.close()
    try:
        until(lambda: len(sleepers()) == 1)
    finally:
        for process in sleepers():
            os.kill(process, signal.SIGKILL)


def test_what_a_command_leaves_running_ends_with_its_unit(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(3))
    before = children()
    reading = Reading(unit_of(f"pipe:sleep {LONG} > /dev/null 2>&1 & cat {shard}"))
    assert reading.reader.unit_error is None
    assert len(reading.samples) == 3
    until(lambda: not sleepers())
    assert children() == before


PROGRAM = """
import sys
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.streams import PipeStream
PipeStream(sys.argv[1], Interrupt()).read(1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_does_not_outlive_a_process_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    begun = tmp_path / "begun"
    command = f"touch {begun}; sleep {LONG} & cat /dev/null; sleep {LONG}"
    with subprocess.Popen([sys.executable, "-c", PROGRAM, command]) as process:
        until(begun.exists)
        until(lambda: len(sleepers()) == 2)
        process.send_signal(number)
        assert process.wait(10) == -number
    until(lambda: not sleepers())


@pytest.mark.parametrize("has_writer", [False, True])
def test_close_ends_the_waiting_for_a_named_pipe(tmp_path: Path, has_writer: bool) -> None:
    fifo = tmp_path / "a.tar"
    os.mkfifo(fifo)
    waiting = Waiting(str(fifo))
    writer = os.open(fifo, os.O_WRONLY) if has_writer else -1
    time.sleep(0.2)
    waiting.close()
    if has_writer:
        os.close(writer)


def test_close_ends_the_wait_between_two_runs_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module, "FIRST_WAIT_S", 60.0)
    waiting = Waiting(f"pipe:echo x >> {tmp_path}/runs; exit 1")
    until((tmp_path / "runs").exists)
    time.sleep(0.2)
    waiting.close()
    assert (tmp_path / "runs").read_text() == "x\n"


def test_close_while_the_threads_are_being_started_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class SlowThread(threading.Thread):
        def start(self) -> None:
            time.sleep(0.1)
            super().start()

    monkeypatch.setattr(batches_module, "Thread", SlowThread)
    waiting = Waiting(f"pipe:sleep {LONG}")
    until(threads)
    waiting.close()


def test_a_failure_that_close_brings_about_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    is_closing = threading.Event()

    class Failing(UnitReader):
        def __iter__(self) -> Any:
            is_closing.wait(10)
            raise RuntimeError("the connection went away")

    monkeypatch.setattr(batches_module, "UnitReader", Failing)
    waiting = Waiting("a.tar")
    waiting.stream._exchange.stop()
    is_closing.set()
    waiting.consumer.join(5)
    waiting.stream.close()
    assert list(waiting.stream) == []


def test_an_interrupted_unit_says_so_and_may_be_tried_again(tmp_path: Path) -> None:
    interrupt = Interrupt()
    reader = UnitReader(unit_of(write_tar(tmp_path / "a.tar", numbered(9))), interrupt)
    items = iter(reader)
    next(items)
    interrupt.set()
    assert list(items) == []
    assert reader.unit_error is not None
    assert (reader.unit_error.message, reader.unit_error.retryable) == ("reading was stopped", True)


def test_a_named_pipe_waits_for_a_writer_that_comes_late_and_writes_slowly(tmp_path: Path) -> None:
    fifo, data = tmp_path / "a.tar", tar_bytes(numbered(5))
    os.mkfifo(fifo)

    def write() -> None:
        time.sleep(0.3)
        with open(fifo, "wb", buffering=0) as file:
            time.sleep(0.3)
            for start in range(0, len(data), 5000):
                file.write(data[start : start + 5000])
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    reading = Reading(unit_of(fifo))
    writer.join()
    assert reading.reader.unit_error is None
    assert len(reading.samples) == 5
