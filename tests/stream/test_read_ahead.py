"""What is read of a sender while the consumer stands still is bounded by bytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from stream_samples import jpeg, tar_bytes, unit_of, write_tar
from stream_server import Answer, Server

from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream.batch import Batch
from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.config import StreamConfig

BLOB_PHOTO = jpeg() + bytes(1 << 20)


def consumed_slowly(stream: BatchStream, num_sent: object) -> tuple[int, int]:
    """Take one batch and stand still until nothing more is sent; then take the rest. Bytes sent before, photos."""
    assert callable(num_sent)
    items = iter(stream)
    first = next(items)
    assert isinstance(first, Batch)
    before, still = -1, 0
    while still < 5:
        time.sleep(0.05)
        now = num_sent()
        before, still = now, still + 1 if now == before else 0
    num_photos = len(first.samples)
    first.release()
    for item in items:
        if isinstance(item, Batch):
            num_photos += len(item.samples)
            item.release()
    return before, num_photos


def test_a_server_is_read_no_further_ahead_than_the_bound_while_the_consumer_stands_still(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "MAX_WAITING_BYTES", 4 << 20)
    server.answers = [Answer(body=tar_bytes([(f"{n:03d}.jpg", BLOB_PHOTO) for n in range(60)]))]
    config = StreamConfig(decode_threads=1)
    with BatchStream([unit_of(server.url())], side=20, batch_size=2, config=config, ring=2) as stream:
        ahead, num_photos = consumed_slowly(stream, lambda: server.num_sent)
    assert num_photos == 60
    # 4 MB wait; 4 photos are in batches, 2 in hands; the kernel holds what its buffers take, 10 MB at most.
    assert 4 << 20 < ahead < 24 << 20
    assert server.num_sent > 60 << 20


def test_a_command_is_read_no_further_ahead_than_the_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batches_module, "MAX_WAITING_BYTES", 4 << 20)
    shard = write_tar(tmp_path / "a.tar", [(f"{n:03d}.jpg", BLOB_PHOTO) for n in range(40)])
    passed = tmp_path / "passed"
    command = f"pipe:for n in $(seq 0 40); do dd if={shard} bs=1M skip=$n count=1 2>/dev/null; echo x >> {passed}; done"
    config = StreamConfig(decode_threads=1)
    with BatchStream([unit_of(command)], side=20, batch_size=2, config=config, ring=2) as stream:
        ahead, num_photos = consumed_slowly(stream, lambda: len(passed.read_bytes()) // 2)
    assert num_photos == 40
    assert 4 < ahead < 14
