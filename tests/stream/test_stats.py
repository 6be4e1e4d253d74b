from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stream_samples import numbered, unit_of, write_tar

from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream import stats as stats_module
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.stats import Depth, StreamStats

SIDE = 20
CONFIG = StreamConfig(decode_threads=2)


def streamed(shard: str, config: StreamConfig = CONFIG, pause_s: float = 0.0) -> StreamStats:
    """The stats at the end, with a consumer that takes so long for each batch."""
    with BatchStream([unit_of(shard)], side=SIDE, batch_size=4, config=config, ring=2) as stream:
        for item in stream:
            if isinstance(item, Batch):
                time.sleep(pause_s)
                item.release()
        return stream.stats()


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real: Callable[..., torch.Tensor] = batches_module.photo_pixels

    def slow(*args: object, **options: object) -> torch.Tensor:
        time.sleep(seconds)
        return real(*args, **options)

    monkeypatch.setattr(batches_module, "photo_pixels", slow)


def test_a_slow_consumer_is_what_limits_and_decoders_wait_for_the_ring(tmp_path: Path) -> None:
    stats = streamed(write_tar(tmp_path / "a.tar", numbered(40)), pause_s=0.05)
    assert stats.limiting_stage == "consumer"
    assert stats.ring_wait_s > 5 * stats.consumer_wait_s
    assert stats.decode_busy < 0.5
    assert 0.3 < stats.mean_batches_ready <= 2


def test_slow_decoding_is_what_limits_and_photos_queue_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, 0.02)
    stats = streamed(write_tar(tmp_path / "a.tar", numbered(120)))
    assert stats.limiting_stage == "decode"
    # 120 photos of 20 ms by two threads, with room for 64 to wait.
    assert stats.decode_busy_s > 2.4
    assert stats.decode_busy > 0.8
    assert stats.room_wait_s > 0.2
    assert stats.mean_samples_queued > 20
    assert stats.consumer_wait_s > 0.8 * stats.seconds
    assert stats.pack_busy_s < 0.1 * stats.decode_busy_s


def test_slow_reading_is_what_limits_and_decoders_wait_for_photos(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(12))
    stats = streamed(f"pipe:head -c 3000 {shard}; sleep 0.5; tail -c +3001 {shard}")
    assert stats.limiting_stage == "read"
    assert stats.read_busy > 0.7
    assert stats.photo_wait_s > 0.4
    assert stats.mean_samples_queued < 1


def test_waits_for_the_decode_memory_are_no_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*_: object, budget: MemoryBudget, **__: object) -> torch.Tensor:
        with budget.hold(2 << 20):
            time.sleep(0.05)
        return torch.zeros((3, SIDE, SIDE), dtype=torch.uint8)

    monkeypatch.setattr(batches_module, "photo_pixels", held)
    config = StreamConfig(decode_threads=4, decode_memory_mb=1)
    stats = streamed(write_tar(tmp_path / "a.tar", numbered(8)), config)
    # One at a time: eight of 50 ms, and while one works the three others wait.
    assert 0.4 <= stats.decode_busy_s < 0.6
    assert stats.memory_wait_s > 0.7
    assert stats.limiting_stage == "decode"


def test_what_each_thread_did_adds_up_to_the_whole_time(tmp_path: Path) -> None:
    stats = streamed(write_tar(tmp_path / "a.tar", numbered(60)), pause_s=0.01)
    threads_s = stats.decode_busy_s + stats.photo_wait_s + stats.memory_wait_s + stats.ring_wait_s
    # The last wait for a photo has no end.
    assert threads_s <= 2 * stats.seconds
    assert stats.read_busy_s + stats.room_wait_s <= stats.seconds
    assert 0 < stats.pack_busy_s <= stats.decode_busy_s
    assert 0 < stats.pack_busy <= stats.decode_busy <= 1


def test_the_clock_begins_with_the_iteration_and_ends_with_it(tmp_path: Path) -> None:
    stream = BatchStream([unit_of(write_tar(tmp_path / "a.tar", []))], side=SIDE, batch_size=4, config=CONFIG)
    time.sleep(0.2)
    assert stream.stats().seconds == 0
    list(stream)
    seconds = stream.stats().seconds
    assert 0 < seconds < 0.2
    time.sleep(0.2)
    assert stream.stats().seconds == seconds
    stream.close()


def test_before_anything_has_happened_every_share_is_zero() -> None:
    with BatchStream([], side=SIDE, batch_size=4, config=CONFIG) as stream:
        stats = stream.stats()
    assert (stats.read_busy, stats.decode_busy, stats.pack_busy, stats.mean_samples_queued) == (0, 0, 0, 0)


def test_a_share_is_that_of_all_threads_together() -> None:
    stats = replace(streamed_nothing(), seconds=10.0, decode_busy_s=30.0, pack_busy_s=6.0, decode_threads=4)
    assert (stats.decode_busy, stats.pack_busy) == (0.75, 0.15)


def streamed_nothing() -> StreamStats:
    with BatchStream([], side=SIDE, batch_size=4, config=CONFIG) as stream:
        return stream.stats()


def test_a_depth_is_averaged_over_time_and_not_over_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stats_module.time, "perf_counter", lambda: now)
    depth = Depth()
    for at, change in ((101.0, 3), (104.0, -1), (104.5, 1), (106.5, -3)):
        now = at
        depth.add(change)
    now = 110.0
    # 3 for 3 s, 2 for half a second, 3 for 2 s, then nothing.
    assert depth.area_s() == 3 * 3 + 2 * 0.5 + 3 * 2
    assert depth.now == 0
