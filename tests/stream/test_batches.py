from __future__ import annotations

import io
import os
import threading
import time
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stream_samples import encoded, jpeg, numbered, tar_bytes, unit_of, write_tar

from geoloc_batch.errors import ConfigError, DecodeError
from geoloc_batch.records import Unit, UnitEnd
from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream import exchange as exchange_module
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import decode_photo, fit

SIDE = 20
CONFIG = StreamConfig(decode_threads=3)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("geoloc-")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert threads() == []


class Run:
    """A stream consumed to its end, the pixels copied out."""

    def __init__(self, units: list[Unit | None], batch_size: int = 4, config: StreamConfig = CONFIG) -> None:
        self.ends: list[UnitEnd] = []
        self.batches: list[Batch] = []
        self.pixels: dict[tuple[int, int], torch.Tensor] = {}
        self.keys: dict[tuple[int, int], str] = {}
        with BatchStream(units, side=SIDE, batch_size=batch_size, config=config) as stream:
            for item in stream:
                if isinstance(item, UnitEnd):
                    self.ends.append(item)
                    continue
                assert item.pixels.shape == (batch_size, 3, SIDE, SIDE)
                assert item.pixels.dtype == torch.uint8
                assert not item.pixels[len(item.samples) :].any()
                for row, sample in enumerate(item.samples):
                    place = (sample.unit.index, sample.row)
                    assert place not in self.pixels
                    self.pixels[place] = item.pixels[row].clone()
                    self.keys[place] = sample.key
                self.batches.append(item)
                item.release()
            self.stats = stream.stats()


def shard(tmp_path: Path, number: int, count: int) -> Unit:
    path = tmp_path / f"{number}.tar"
    return unit_of(write_tar(path, numbered(count)), index=number, num_bytes=path.stat().st_size)


def square(seed: int) -> torch.Tensor:
    return fit(decode_photo(jpeg(seed=seed)), SIDE)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_every_photo_comes_once_with_its_own_pixels(tmp_path: Path, batch_size: int) -> None:
    run = Run([shard(tmp_path, 0, 9), shard(tmp_path, 1, 0), shard(tmp_path, 2, 5)], batch_size)
    assert sorted(run.pixels) == [(0, n) for n in range(9)] + [(2, n) for n in range(5)]
    for (unit, row), pixels in run.pixels.items():
        assert torch.equal(pixels, square(row))
        assert run.keys[unit, row] == f"{row:05d}"
    assert sorted((end.unit.index, end.num_samples, end.errors, end.unit_error) for end in run.ends) == [
        (0, 9, (), None),
        (1, 0, (), None),
        (2, 5, (), None),
    ]
    # Batches run across the borders of shards: only the last one is padded.
    assert [len(batch.samples) for batch in run.batches[:-1]] == [batch_size] * (len(run.batches) - 1)
    assert run.stats.photos == 14
    assert run.stats.bytes_read >= sum(end.unit.num_bytes for end in run.ends) - 3 * 10240
    assert run.stats.decode_threads == 3
    assert run.stats.decode_busy_s > 0
    assert run.stats.read_busy_s > 0


def test_photos_that_cannot_be_decoded_are_errors_in_row_order_and_leave_no_hole(tmp_path: Path) -> None:
    members = numbered(12)
    for number in (3, 4, 11):
        members[2 * number] = (f"{number:05d}.jpg", b"no photo")
    members.insert(4, ("00000.jpg", jpeg()))
    run = Run([unit_of(write_tar(tmp_path / "a.tar", members))])
    (end,) = run.ends
    assert [(error.row, error.key, error.stage, error.retryable) for error in end.errors] == [
        (2, "00000", "read", False),
        (4, "00003", "decode", False),
        (5, "00004", "decode", False),
        (12, "00011", "decode", False),
    ]
    assert end.num_samples == 13
    assert len(run.pixels) == 9
    assert [len(batch.samples) for batch in run.batches] == [4, 4, 1]


def test_a_fault_of_this_machine_is_a_retryable_row_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches_module.photo_pixels

    def short_of_memory(data: bytes, *args: object, **options: object) -> torch.Tensor:
        if data == jpeg(seed=1):
            raise MemoryError("no room")
        return real(data, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batches_module, "photo_pixels", short_of_memory)
    (end,) = Run([shard(tmp_path, 0, 3)]).ends
    (error,) = end.errors
    assert (error.row, error.retryable, error.message) == (1, True, "MemoryError: no room")


def test_a_damaged_unit_keeps_its_photos_and_the_next_unit_goes_on(tmp_path: Path) -> None:
    data = tar_bytes(numbered(5))
    (tmp_path / "cut.tar").write_bytes(data[:5000])
    units = [unit_of(tmp_path / "cut.tar"), unit_of(tmp_path / "absent.tar", index=1), shard(tmp_path, 2, 3)]
    run = Run(units)
    ends = {end.unit.index: end for end in run.ends}
    assert ends[0].unit_error is not None
    assert ends[0].unit_error.offset > 0
    assert ends[1].unit_error is not None
    assert ends[1].unit_error.offset == -1
    assert ends[2].unit_error is None
    assert sum(unit == 0 for unit, _ in run.pixels) == ends[0].num_samples > 0
    assert sum(unit == 2 for unit, _ in run.pixels) == 3


def test_the_next_unit_is_asked_for_only_when_the_one_before_is_read(tmp_path: Path) -> None:
    asked: list[tuple[int, str]] = []
    fifo = tmp_path / "slow.tar"
    os.mkfifo(fifo)

    def units() -> Iterator[Unit]:
        for index, path in enumerate((fifo, shard(tmp_path, 1, 2).source)):
            asked.append((index, threading.current_thread().name))
            yield unit_of(path, index=index)

    with BatchStream(units(), side=SIDE, batch_size=2, config=CONFIG) as stream:
        feeder = threading.Thread(target=feed, args=(fifo, tar_bytes(numbered(3)), asked))
        feeder.start()
        rows = [sample.key for item in stream if isinstance(item, Batch) for sample in released(item).samples]
        feeder.join(10)
    assert len(rows) == 5
    assert asked == [(0, "geoloc-read"), (1, "geoloc-read")]


def feed(fifo: Path, data: bytes, asked: list[tuple[int, str]]) -> None:
    with open(fifo, "wb", buffering=0) as file:
        file.write(data[:2000])
        time.sleep(0.2)
        # With the first unit still open, the second must not have been asked for.
        file.write(data[2000:] if len(asked) == 1 else b"")


def released(batch: Batch) -> Batch:
    batch.release()
    return batch


def test_none_hands_over_what_is_partly_filled(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def units() -> Iterator[Unit | None]:
        yield shard(tmp_path, 0, 5)
        yield None
        assert may_go_on.wait(20)
        yield None
        yield shard(tmp_path, 1, 2)

    with BatchStream(units(), side=SIDE, batch_size=4, config=CONFIG) as stream:
        items = iter(stream)
        first = [next(items) for _ in range(3)]
        assert sorted(len(item.samples) for item in first if isinstance(item, Batch)) == [1, 4]
        (padded,) = (item for item in first if isinstance(item, Batch) and len(item.samples) == 1)
        assert not padded.pixels[1:].any()
        for item in first:
            if isinstance(item, Batch):
                item.release()
        may_go_on.set()
        rest = list(items)
    assert [len(item.samples) for item in rest if isinstance(item, Batch)] == [2]


def test_a_consumer_may_hold_all_batches_but_one(tmp_path: Path) -> None:
    with BatchStream([shard(tmp_path, 0, 23)], side=SIDE, batch_size=2, config=CONFIG, ring=4) as stream:
        held: list[Batch] = []
        seen: list[int] = []
        for item in stream:
            if isinstance(item, Batch):
                held.append(item)
                seen += [sample.row for sample in item.samples]
                # What is held must not be written to.
                for batch in held:
                    for row, sample in enumerate(batch.samples):
                        assert torch.equal(batch.pixels[row], square(sample.row))
                if len(held) == 3:
                    held.pop(0).release()
        assert sorted(seen) == list(range(23))


def test_a_second_release_does_not_free_a_buffer_that_was_lent_again(tmp_path: Path) -> None:
    with BatchStream([shard(tmp_path, 0, 6)], side=SIDE, batch_size=1, config=CONFIG, ring=1) as stream:
        batches = (item for item in stream if isinstance(item, Batch))
        first = next(batches)
        first.release()
        second = next(batches)
        pixels = second.pixels.clone()
        first.release()
        time.sleep(0.1)
        assert torch.equal(second.pixels, pixels)
        assert stream.stats().batches_ready == 0
        second.release()
        assert len(list(map(released, batches))) == 4


def test_the_reader_stops_at_the_bytes_that_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MAX_WAITING_BYTES", 40_000)
    members = [(f"{n}.jpg", jpeg(seed=n) + bytes(9000)) for n in range(200)]
    unit = unit_of(write_tar(tmp_path / "a.tar", members))
    with BatchStream([unit], side=SIDE, batch_size=2, config=CONFIG, ring=2) as stream:
        items = iter(stream)
        held = [next(items), next(items)]
        time.sleep(0.3)
        stats = stream.stats()
        assert 0 < stats.bytes_queued <= 40_000
        assert stats.samples_queued <= 4
        # Two batches, three photos in the threads' hands, those that wait, and the reader's own.
        assert stats.bytes_read < 20 * 12_000 + (1 << 20)
        for item in held:
            assert isinstance(item, Batch)
            item.release()
        rest = [released(item) for item in items if isinstance(item, Batch)]
    assert 2 * (len(rest) + 2) == 200


def test_a_photo_larger_than_all_that_may_wait_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MAX_WAITING_BYTES", 10)
    assert len(Run([shard(tmp_path, 0, 7)]).pixels) == 7


def test_units_without_photos_do_not_run_ahead_of_the_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "MAX_ENDS_AHEAD", 5)
    path = write_tar(tmp_path / "empty.tar", [])
    asked: list[int] = []

    def units() -> Iterator[Unit]:
        for index in range(50):
            asked.append(index)
            yield unit_of(path, index=index)

    with BatchStream(units(), side=SIDE, batch_size=2, config=CONFIG) as stream:
        items = iter(stream)
        next(items)
        time.sleep(0.2)
        assert len(asked) <= 8
        assert len(list(items)) == 49


@pytest.mark.parametrize("when", ["before", "at once", "half-way", "at the end", "in the ring"])
def test_close_ends_all_threads_whenever_it_comes(tmp_path: Path, when: str) -> None:
    is_closed = threading.Event()

    def units() -> Iterator[Unit]:
        try:
            for index in range(50):
                yield shard(tmp_path, index, 4)
        finally:
            is_closed.set()

    stream = BatchStream(units(), side=SIDE, batch_size=3, config=CONFIG, ring=2)
    items = iter(stream)
    if when != "before":
        first = next(items)
        assert len(threads()) > 0
    if when == "half-way":
        assert isinstance(first, Batch | UnitEnd)
        for item, _ in zip(items, range(20), strict=False):
            if isinstance(item, Batch):
                item.release()
    elif when == "at the end":
        for item in chain([first], items):
            if isinstance(item, Batch):
                item.release()
    elif when == "in the ring":
        # Nothing is released: every decode thread waits for a buffer.
        time.sleep(0.2)
    stream.close()
    stream.close()
    assert threads() == []
    assert list(items) == []
    assert is_closed.is_set() == (when != "before")


def test_close_ends_a_consumer_that_waits_in_another_thread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never.tar")
    stream = BatchStream([unit_of(f"pipe:sleep 60; cat {tmp_path}/x")], side=SIDE, batch_size=2, config=CONFIG)
    got: list[object] = []
    consumer = threading.Thread(target=lambda: got.extend(stream))
    consumer.start()
    time.sleep(0.3)
    started = time.monotonic()
    stream.close()
    consumer.join(5)
    assert not consumer.is_alive()
    assert time.monotonic() - started < 5
    assert got == []


def test_what_the_units_raise_reaches_the_consumer(tmp_path: Path) -> None:
    class LeaseLostError(Exception):
        pass

    def units() -> Iterator[Unit]:
        yield shard(tmp_path, 0, 3)
        raise LeaseLostError("unit 1")

    with (
        BatchStream(units(), side=SIDE, batch_size=64, config=CONFIG) as stream,
        pytest.raises(LeaseLostError, match="unit 1") as caught,
    ):
        list(stream)
    assert "units" in "".join(traceback.format_tb(caught.tb))


def test_a_slow_photo_does_not_hold_the_others_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches_module.photo_pixels
    gate = threading.Event()

    def slow(data: bytes, *args: object, **options: object) -> torch.Tensor:
        if data == jpeg(seed=0):
            assert gate.wait(20)
        return real(data, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batches_module, "photo_pixels", slow)
    with BatchStream([shard(tmp_path, 0, 9)], side=SIDE, batch_size=2, config=CONFIG) as stream:
        items = iter(stream)
        rows = []
        for _ in range(4):
            item = next(items)
            assert isinstance(item, Batch)
            rows += [sample.row for sample in item.samples]
            item.release()
        assert sorted(rows) == list(range(1, 9))
        gate.set()
        last = [item for item in items if isinstance(item, Batch)]
        assert [sample.row for batch in last for sample in batch.samples] == [0]


def test_a_photo_of_12_megapixels_does_not_stall_the_small_ones(tmp_path: Path) -> None:
    large = jpeg(3024, 4032, quality=60)
    members = [("large.jpg", large), *((f"{n:03d}.jpg", jpeg(seed=n)) for n in range(100))]
    unit = unit_of(write_tar(tmp_path / "a.tar", members))
    with BatchStream([unit], side=SIDE, batch_size=4, config=StreamConfig(decode_threads=2)) as stream:
        keys = [sample.key for item in stream if isinstance(item, Batch) for sample in released(item).samples]
    assert len(set(keys)) == 101
    # The large one takes as long as a thousand small ones, and was begun before them all.
    assert keys.index("large") > 40


def test_large_photos_at_a_time_stay_within_the_decode_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[MemoryBudget] = []

    def noted(limit: int) -> MemoryBudget:
        budgets.append(MemoryBudget(limit))
        return budgets[-1]

    monkeypatch.setattr(batches_module, "MemoryBudget", noted)
    large = jpeg(1512, 2016, quality=60)
    members = [(f"{n}.jpg", large) for n in range(6)]
    config = StreamConfig(decode_threads=4, decode_memory_mb=25)
    run = Run([unit_of(write_tar(tmp_path / "a.tar", members))], config=config)
    assert len(run.pixels) == 6
    # 9 MB each and some for resizing: two fit, four would not.
    assert 9_000_000 < budgets[0].peak <= 25 << 20


def test_the_next_unit_is_read_while_the_last_photos_of_one_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batches_module.photo_pixels
    gate = threading.Event()
    held: list[bytes] = []

    def held_up(data: bytes, *args: object, **options: object) -> torch.Tensor:
        held.append(data)
        assert gate.wait(20)
        return real(data, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batches_module, "photo_pixels", held_up)
    units = [shard(tmp_path, 0, 3), shard(tmp_path, 1, 5), shard(tmp_path, 2, 4)]
    with BatchStream(units, side=SIDE, batch_size=4, config=CONFIG) as stream:
        rows: list[int] = []
        consumer = threading.Thread(target=lambda: rows.extend(drained(stream)))
        consumer.start()
        deadline = time.monotonic() + 10
        # The three threads hold unit 0's photos; all of units 1 and 2 is read behind their backs.
        while (len(held) < 3 or stream.stats().samples_queued < 9) and time.monotonic() < deadline:
            time.sleep(0.01)
        stats = stream.stats()
        gate.set()
        consumer.join(10)
    assert (stats.photos, stats.samples_queued) == (0, 9)
    assert len(rows) == 12


def drained(stream: BatchStream) -> list[int]:
    return [sample.row for item in stream if isinstance(item, Batch) for sample in released(item).samples]


def test_errors_are_told_in_row_order_whichever_came_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_failed = threading.Event()

    def failing(data: bytes, *args: object, **options: object) -> torch.Tensor:
        if data == b"0":
            assert last_failed.wait(20)
            time.sleep(0.05)
        last_failed.set()
        raise DecodeError(data.decode())

    monkeypatch.setattr(batches_module, "photo_pixels", failing)
    (end,) = Run([unit_of(write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1")]))]).ends
    assert [(error.row, error.message) for error in end.errors] == [(0, "0"), (1, "1")]


def test_photos_larger_than_the_decode_memory_go_through_one_at_a_time(tmp_path: Path) -> None:
    photos = [(f"{n}.jpg", jpeg(900, 1200, seed=n)) for n in range(6)]
    config = StreamConfig(decode_threads=3, decode_memory_mb=1)
    run = Run([unit_of(write_tar(tmp_path / "a.tar", photos))], config=config)
    assert len(run.pixels) == 6


def test_the_config_reaches_the_decoder(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = encoded(Image.fromarray(np.repeat(np.arange(240, dtype=np.uint8)[:, None], 60, axis=1)), exif=exif)
    unit = unit_of(write_tar(tmp_path / "a.tar", [("a.jpg", tall), ("b.jpg", jpeg(200, 100))]))
    plain = Run([unit])
    turned = Run([unit], config=StreamConfig(decode_threads=1, apply_orientation=True))
    assert not torch.equal(plain.pixels[0, 0], turned.pixels[0, 0])
    assert torch.equal(turned.pixels[0, 0], fit(decode_photo(tall, apply_orientation=True), SIDE))
    small = Run([unit], config=StreamConfig(decode_threads=1, max_pixels=15_000))
    assert [error.key for error in small.ends[0].errors] == ["b"]


def test_decode_threads_default_to_the_usable_cpus_less_one_from_three_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, expected in ((1, 1), (2, 2), (3, 2), (16, 15)):
        monkeypatch.setattr(batches_module, "usable_cpus", lambda cpus=cpus: cpus)
        stream = BatchStream([], side=SIDE, batch_size=1, config=StreamConfig())
        assert stream.stats().decode_threads == expected


@pytest.mark.parametrize(("batch_size", "gigabytes"), [(100_000_000, "192000.0"), (10**30, "")])
def test_batches_beyond_the_memory_are_refused_by_flag_value_and_size(batch_size: int, gigabytes: str) -> None:
    with pytest.raises(ConfigError, match=f"--batch-size {batch_size} needs {gigabytes}.* GB for the 4 batches"):
        BatchStream([], side=SIDE * 20, batch_size=batch_size, config=CONFIG)


def test_batches_that_the_allocator_refuses_are_refused_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", refusing)
    with pytest.raises(ConfigError, match=r"--batch-size 7 needs 0\.0 GB for the 4 batches"):
        BatchStream([], side=SIDE, batch_size=7, config=CONFIG)


def anonymous_kb() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def test_memory_does_not_grow_with_the_photos_of_a_shard(tmp_path: Path) -> None:
    photos = [jpeg(120, 160, seed=n) for n in range(20)]

    units = {
        count: unit_of(write_tar(tmp_path / f"{count}.tar", [(f"{n:06d}.jpg", photos[n % 20]) for n in range(count)]))
        for count in (6000, 1000)
    }

    def peak(count: int) -> int:
        most = 0
        with BatchStream([units[count]], side=SIDE, batch_size=32, config=CONFIG) as stream:
            for item in stream:
                if isinstance(item, Batch):
                    item.release()
                    most = max(most, anonymous_kb())
        return most

    peak(1000)
    few, many = peak(1000), peak(6000)
    # The larger shard has 60 MB more of photos.
    assert many < few + 15_000, f"{few} kB with 1000 photos, {many} kB with 6000"


def test_decoding_starts_no_threads_of_torch(tmp_path: Path) -> None:
    big = io.BytesIO()
    Image.fromarray(np.zeros((2000, 3000, 3), np.uint8)).save(big, "JPEG")
    unit = unit_of(write_tar(tmp_path / "a.tar", [(f"{n}.jpg", big.getvalue()) for n in range(6)]))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        tasks = len(os.listdir("/proc/self/task"))
        with BatchStream([unit], side=336, batch_size=2, config=StreamConfig(decode_threads=2)) as stream:
            most = 0
            for item in stream:
                most = max(most, len(os.listdir("/proc/self/task")))
                if isinstance(item, Batch):
                    item.release()
        assert most <= tasks + 3
    finally:
        torch.set_num_threads(before)
