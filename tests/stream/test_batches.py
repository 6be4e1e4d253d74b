"""Batches: every photo once with its own pixels, errors in their place, memory that does not grow."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batch_samples import CONFIG, SIDE, Run, shard, square
from PIL import Image
from stream_samples import encoded, jpeg, numbered, tar_bytes, unit_of, write_tar

from geoloc_batch.errors import ConfigError, DecodeError
from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import decode_photo, fit


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
