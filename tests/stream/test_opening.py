"""Shards that are not what they were when they were planned, or cannot be opened."""

from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path

import pytest
from stream_samples import Reading, numbered, tar_bytes, told, unit_of, write_tar
from stream_server import DATA, Answer, Server

from geoloc_batch.records import Unit
from geoloc_batch.stream import opening as opening_module
from geoloc_batch.stream.opening import is_lasting
from geoloc_batch.stream.shards import plan_units

MEMBERS = numbered(40)


def opening_error(unit: Unit) -> tuple[str, bool]:
    """Message and retryable of a unit of which nothing is read."""
    reading = Reading(unit)
    error = reading.reader.unit_error
    assert error is not None
    assert (reading.items, reading.reader.num_photos, reading.reader.bytes_read) == ([], 0, 0)
    assert (error.offset, error.bytes_unread) == (-1, unit.num_bytes or None)
    return error.message, error.retryable


@pytest.mark.parametrize("num_photos", [3, 60])
@pytest.mark.parametrize("is_gzipped", [False, True])
def test_a_shard_of_another_size_than_planned_is_read_and_both_sizes_are_told(
    tmp_path: Path, num_photos: int, is_gzipped: bool
) -> None:
    shard = tmp_path / "a.tar"
    pack = gzip.compress if is_gzipped else bytes
    shard.write_bytes(pack(DATA))
    (unit,) = plan_units([str(shard)])
    planned = len(shard.read_bytes())
    assert Reading(unit).reader.warnings == ()
    shard.write_bytes(pack(tar_bytes(numbered(num_photos, first=5))))
    now = len(shard.read_bytes())
    reading = Reading(unit)
    assert [sample.key for sample in reading.samples] == [f"{n:05d}" for n in range(5, 5 + num_photos)]
    assert reading.reader.unit_error is None
    assert reading.reader.warnings == (
        f"it had {planned} bytes when it was planned and has {now} now; it is read as it is",
    )


def test_a_shard_that_is_empty_by_now_says_so_and_is_damaged(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", MEMBERS)
    (unit,) = plan_units([shard])
    os.truncate(shard, 0)
    reading = Reading(unit)
    assert f"it had {len(DATA)} bytes when it was planned and has 0 now" in reading.reader.warnings[0]
    assert reading.reader.unit_error is not None


def test_a_shard_of_equal_or_unknown_size_is_read_without_a_word(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", MEMBERS)
    (unit,) = plan_units([shard])
    write_tar(tmp_path / "a.tar", numbered(40, first=50))
    reading = Reading(unit)
    assert (len(reading.samples), reading.samples[0].key, reading.reader.warnings) == (40, "00050", ())
    for other in (unit_of(shard), unit_of(f"pipe:cat {shard}"), unit_of(f"pipe:cat {shard}", num_bytes=7)):
        assert Reading(other).reader.warnings == ()


def test_a_shard_of_a_server_that_has_another_length_by_now_is_told(server: Server) -> None:
    (unit,) = plan_units([server.url()])
    server.answers = [Answer(body=tar_bytes(numbered(4)))]
    reading = Reading(unit)
    assert len(reading.samples) == 4
    assert reading.reader.warnings == (
        f"it had {len(DATA)} bytes when it was planned and has {len(tar_bytes(numbered(4)))} now; it is read as it is",
    )


@pytest.fixture
def ranges(tmp_path: Path) -> list[Unit]:
    """Parts of one tar."""
    units = plan_units([write_tar(tmp_path / "a.tar", MEMBERS)], split_bytes=30_000)
    assert len(units) > 3
    assert [row for unit in units for row in told(Reading(unit).samples)] == told(
        Reading(unit_of(tmp_path / "a.tar")).samples
    )
    assert all(Reading(unit).reader.warnings == () for unit in units)
    return units


@pytest.mark.parametrize("change", ["shrunk", "grown", "gzipped", "empty"])
def test_the_last_range_of_a_file_of_another_size_is_a_retryable_unit_error_and_unread(
    tmp_path: Path, ranges: list[Unit], change: str
) -> None:
    data = {
        "shrunk": DATA[:-512],
        "grown": DATA + bytes(512),
        "gzipped": gzip.compress(DATA),
        "empty": b"",
    }[change]
    (tmp_path / "a.tar").write_bytes(data)
    message, is_retryable = opening_error(ranges[-1])
    assert is_retryable
    if change != "gzipped":
        assert f"it had {len(DATA)} bytes when it was planned and has {len(data)} now" in message


@pytest.mark.parametrize(
    "change", ["other members", "gzipped", "gzipped and larger", "cut before its end", "cut at its end", "empty"]
)
def test_every_range_of_a_replaced_file_is_a_retryable_unit_error_and_unread(
    tmp_path: Path, ranges: list[Unit], change: str
) -> None:
    unit = ranges[1]
    assert unit.stop is not None
    data = {
        "other members": tar_bytes([("first.txt", bytes(700)), *MEMBERS]),
        "gzipped": gzip.compress(DATA),
        "gzipped and larger": gzip.compress(os.urandom(2 * len(DATA))),
        "cut before its end": DATA[: unit.stop - 512],
        "cut at its end": DATA[: unit.stop],
        "empty": b"",
    }[change]
    (tmp_path / "a.tar").write_bytes(data)
    before = os.listdir("/proc/self/fd")
    for part in ranges[1:] if change.startswith("cut") else ranges:
        message, is_retryable = opening_error(part)
        assert is_retryable
        assert "put the file back as it was" in message
        if change.startswith("cut"):
            assert f"and has {len(data)} now" in message
    assert os.listdir("/proc/self/fd") == before


def test_a_replaced_file_of_equal_size_is_known_by_the_borders_of_its_ranges(
    tmp_path: Path, ranges: list[Unit]
) -> None:
    members = [*MEMBERS[2:], ("last.jpg", b"")]
    data = tar_bytes([("first.txt", bytes(700)), *members])
    (tmp_path / "a.tar").write_bytes(data[: len(DATA)].ljust(len(DATA), b"\0"))
    for unit in ranges:
        message, _ = opening_error(unit)
        assert "no member begins at byte" in message


def test_ranges_before_what_was_appended_are_read_as_before(tmp_path: Path, ranges: list[Unit]) -> None:
    before = told(Reading(ranges[0]).samples)
    (tmp_path / "a.tar").write_bytes(DATA + tar_bytes(numbered(3, first=90)))
    assert told(Reading(ranges[0]).samples) == before


@pytest.mark.parametrize("kind", ["gone", "forbidden", "in a folder that is gone"])
def test_what_may_come_back_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "folder" / "a.tar" if "folder" in kind else tmp_path / "a.tar"
    if kind == "forbidden":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(opening_module, "open_source", refuse)
    message, is_retryable = opening_error(unit_of(path, num_bytes=77))
    assert is_retryable
    assert message == f"cannot be opened: {os.strerror(errno.EACCES if kind == 'forbidden' else errno.ENOENT)}"


@pytest.mark.parametrize(
    "kind", ["a folder", "too long a name", "below a file", "a ring of links", "too long a command"]
)
def test_what_no_other_try_will_open_is_not_retryable(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    (tmp_path / "ring.tar").symlink_to("ring.tar")
    source = {
        "a folder": str(tmp_path),
        "too long a name": str(tmp_path / ("n" * 300)),
        "below a file": str(tmp_path / "a.tar" / "b.tar"),
        "a ring of links": str(tmp_path / "ring.tar"),
        "too long a command": "pipe:true " + "x" * 300_000,
    }[kind]
    _, is_retryable = opening_error(unit_of(source, num_bytes=77))
    assert not is_retryable


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "ENODEV", "ENOMEM"])
def test_faults_of_the_machine_do_not_last(name: str) -> None:
    assert not is_lasting(OSError(getattr(errno, name), "words"))
    assert not is_lasting(OSError("without a number"))
