"""Who runs in bench_stream.py: the stream, the bare decode pool, webdataset with a DataLoader, the quick start's loop.

Each takes a set of photos and gives its pace. Each clock starts when the contender is warm: the stream when it has
given as many batches as its ring has (fresh memory is slow), the loader when each worker has given one.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from stream_photos import PhotoSet

from geoloc_batch.records import Sample, Unit
from geoloc_batch.stream.batches import Batch, BatchStream, StreamStats
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import decode_photo, fit
from geoloc_batch.stream.samples import UnitReader

SIDE = 336
RING = 4


@dataclass(frozen=True)
class Pace:
    """How fast one contender was."""

    photos_per_s: float
    cpu_ms: float
    """CPU time of this process, and of no other, for one photo."""


class Clock:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def pace(self, photos: int) -> Pace:
        """Of so many photos since then."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return Pace(photos / wall, 1000 * cpu / photos)


def stream(photos: PhotoSet, threads: int) -> tuple[Pace, StreamStats]:
    """Ours: BatchStream over the shards, each batch released at once."""
    config = StreamConfig(decode_threads=threads)
    counted, clock = 0, None
    with BatchStream(
        units(photos.shards), side=SIDE, batch_size=photos.batch_size, config=config, ring=RING
    ) as batches:
        for number, batch in enumerate(item for item in batches if isinstance(item, Batch)):
            counted += len(batch.samples) if clock else 0
            batch.release()
            if number + 1 == RING:
                clock = Clock()
        assert clock, f"{photos.name}: fewer than {RING} batches"
        pace = clock.pace(counted)
        stats = batches.stats()
    assert stats.photos == photos.num_photos, f"{stats.photos} of {photos.num_photos} photos came"
    return pace, stats


def pool(photos: PhotoSet, threads: int) -> Pace:
    """The limit: the same decoding and resizing on bytes that are in memory, the pixels dropped."""
    todo, numbers = photos.photos, count()

    def work() -> None:
        while (number := next(numbers)) < len(todo):
            fit(decode_photo(todo[number]), SIDE)

    workers = [Thread(target=work) for _ in range(threads)]
    clock = Clock()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return clock.pace(len(todo))


def loader(photos: PhotoSet, workers: int) -> Pace:
    """The webdataset pipeline in the workers of a DataLoader, with open_clip's own transform for such a model."""
    import webdataset
    from open_clip.transform import image_transform

    transform = image_transform(SIDE, is_train=False)
    dataset = (
        webdataset.WebDataset(list(photos.shards), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(transform)
        .batched(photos.batch_size)
    )
    batches = iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))
    # A short trial has nothing to spare for warming up.
    num_warm = workers if photos.num_photos >= 3 * workers * photos.batch_size else 0
    warm = sum(len(batch) for (batch,) in islice(batches, num_warm))
    clock = Clock()
    pace = clock.pace(counted := sum(len(batch) for (batch,) in batches))
    assert warm + counted == photos.num_photos, f"{warm + counted} of {photos.num_photos} photos came"
    return pace


def quick_start(photos: PhotoSet, limit: int) -> Pace:
    """The published loop: PIL and CLIPImageProcessor, one photo at a time, torch's own threads."""
    processor = clip_processor()
    todo = photos.photos[:limit]
    with torch_threads(len(os.sched_getaffinity(0))):
        processor(images=Image.open(io.BytesIO(todo[0])).convert("RGB"), return_tensors="pt")
        clock = Clock()
        for data in todo:
            processor(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]
        return clock.pace(len(todo))


def clip_processor(**options: Any) -> Any:
    """The CLIPImageProcessor of transformers for the encoder's side."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **options)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch's own operations use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def units(shards: tuple[str, ...]) -> list[Unit]:
    """The shards as the stream takes them."""
    return [Unit(index=index, kind="shard", source=shard) for index, shard in enumerate(shards)]


def walk_ours(shard: str) -> int:
    """Photos of a shard, each with key, bytes and json, by the stream's own reader."""
    return len([(sample.key, len(data)) for sample, data in _samples(shard)])


def walk_webdataset(shard: str) -> int:
    """The same by webdataset's iterator."""
    import webdataset

    samples = webdataset.WebDataset(shard, shardshuffle=False)
    return len([(sample["__key__"], len(sample["jpg"])) for sample in samples])


def walk_tarfile(shard: str) -> int:
    """Members by the standard library, read, but not put together; two are a photo."""
    with tarfile.open(shard) as tar:
        members = [(member.name, len(tar.extractfile(member).read())) for member in tar if member.isreg()]
    return len(members) // 2


WALKS: dict[str, Callable[[str], int]] = {
    "ours": walk_ours,
    "webdataset": walk_webdataset,
    "tarfile": walk_tarfile,
}


def _samples(shard: str) -> Iterator[tuple[Sample, bytes]]:
    reader = UnitReader(Unit(index=0, kind="shard", source=shard))
    for item in reader:
        assert isinstance(item, tuple), item
        yield item
    assert reader.unit_error is None, reader.unit_error


def streamed_pixels(shard: str) -> dict[int, np.ndarray[Any, Any]]:
    """Each row's pixels as the stream gives them, [S, S, 3] uint8."""
    pixels = {}
    with BatchStream(units((shard,)), side=SIDE, batch_size=8, config=StreamConfig()) as batches:
        for item in batches:
            if isinstance(item, Batch):
                for row, sample in enumerate(item.samples):
                    pixels[sample.row] = item.pixels[row].permute(1, 2, 0).numpy().copy()
                item.release()
            else:
                assert (item.errors, item.unit_error) == ((), None), item
    return pixels
