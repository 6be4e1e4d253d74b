"""Commands and named pipes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from stream_samples import Reading, numbered, told, unit_of, write_tar
from stream_server import DATA, unit_error

from geoloc_batch.stream import backoff as backoff_module
from geoloc_batch.stream import streams as streams_module
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.samples import UnitReader


def is_whole(reading: Reading) -> bool:
    return len(reading.samples) == 40 and reading.reader.unit_error is None and reading.reader.warnings == ()


def is_a_beginning(reading: Reading) -> bool:
    rows = [row for row, _, _ in told(reading.samples)]
    return rows == list(range(len(rows))) and 0 < len(rows) < 40


def test_a_pipe_is_read_like_its_file(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    assert is_whole(Reading(unit_of(f"pipe:cat {shard}")))
    assert is_whole(Reading(unit_of(f"pipe:gzip -c < {shard}")))


def test_a_named_pipe_is_read_as_a_stream(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    writer = threading.Thread(target=lambda: (tmp_path / "a.tar").write_bytes(DATA))
    writer.start()
    assert is_whole(Reading(unit_of(tmp_path / "a.tar")))
    writer.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module, "FIRST_WAIT_S", 0.01)


def test_a_command_that_fails_is_a_retryable_unit_error_even_after_a_whole_tar(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:cat {shard}; exit 7"))
    assert len(reading.samples) == 40
    assert unit_error(reading).retryable
    assert "exit status 7" in unit_error(reading).message
    cut = Reading(unit_of(f"pipe:head -c 20000 {shard}; kill -9 $$"))
    assert is_a_beginning(cut)
    assert "signal 9" in unit_error(cut).message


def test_a_pipe_that_ends_early_without_complaint_may_be_tried_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:head -c 20000 {shard}"))
    assert is_a_beginning(reading)
    assert unit_error(reading).retryable
    assert unit_error(reading).bytes_unread is None
    assert unit_error(Reading(unit_of("pipe:true"))).retryable
    assert not unit_error(Reading(unit_of("pipe:echo no tar at all"))).retryable


def test_a_pipe_is_ended_when_enough_photos_were_read(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:cat {shard}; sleep 60", max_rows=3))
    assert [sample.row for sample in reading.samples] == [0, 1, 2]
    assert reading.reader.unit_error is None


def test_abort_ends_a_pipe_that_says_nothing(tmp_path: Path) -> None:
    interrupt = Interrupt()
    reader = UnitReader(unit_of(f"pipe:touch {tmp_path}/begun; sleep 60 & sleep 60"), interrupt)
    thread = threading.Thread(target=lambda: list(reader))
    thread.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    interrupt.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("fault", ["exit 7", "kill -9 $$"])
def test_a_command_that_fails_before_it_gave_anything_is_run_again(tmp_path: Path, fault: str) -> None:
    runs, shard = tmp_path / "runs", write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:echo x >> {runs}; test $(wc -l < {runs}) -ge 3 && exec cat {shard}; {fault}"))
    assert (len(reading.samples), reading.reader.unit_error) == (40, None)
    (warning,) = reading.reader.warnings
    assert "was run 3 times" in warning
    assert ("exit status 7" if "7" in fault else "signal 9") in warning
    assert runs.read_text().split() == ["x"] * 3


@pytest.mark.parametrize(
    ("command", "num_runs", "words"),
    [
        ("exit 7", 3, "exit status 7, as in 2 runs before"),
        ("nosuchcommand 2> /dev/null", 1, "exit status 127"),
        ("head -c 1 {shard}; exit 7", 1, "exit status 7"),
        ("head -c 20000 {shard}; exit 7", 1, "exit status 7"),
        ("true", 1, "empty (0 bytes)"),
    ],
)
def test_a_command_is_run_three_times_at_most_and_never_once_it_gave_something(
    tmp_path: Path, command: str, num_runs: int, words: str
) -> None:
    runs, shard = tmp_path / "runs", write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:echo x >> {runs}; {command.format(shard=shard)}"))
    assert len(runs.read_text().split()) == num_runs
    error = unit_error(reading)
    assert words in error.message
    assert error.retryable
    assert is_a_beginning(reading) or not reading.items


@pytest.mark.parametrize(
    ("command", "num_photos", "words"),
    [
        ("sleep 60", 0, "wrote nothing for 0.3 s"),
        ("cat {shard}; sleep 60", 40, "wrote nothing for 0.3 s"),
        ("cat {shard}; exec >&-; sleep 60", 40, "closed its output and did not end for 0.3 s"),
    ],
)
def test_a_command_that_stalls_is_ended_and_is_a_retryable_unit_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, num_photos: int, words: str
) -> None:
    monkeypatch.setattr(streams_module, "COMMAND_STALL_TIMEOUT_S", 0.3)
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    started = time.monotonic()
    reading = Reading(unit_of("pipe:" + command.format(shard=shard)))
    assert time.monotonic() - started < 5
    assert len(reading.samples) == num_photos
    assert unit_error(reading).retryable
    assert words in unit_error(reading).message
