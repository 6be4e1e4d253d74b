"""What the tests of batches share: a stream that is read to its end, and units for it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from stream_samples import jpeg, numbered, unit_of, write_tar

from geoloc_batch.records import Unit, UnitEnd
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import decode_photo, fit

SIDE = 20
CONFIG = StreamConfig(decode_threads=3)


def threads() -> list[str]:
    """Names of a stream's threads that live."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("geoloc-")]


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
    """A tar of so many photos."""
    path = tmp_path / f"{number}.tar"
    return unit_of(write_tar(path, numbered(count)), index=number, num_bytes=path.stat().st_size)


def square(seed: int) -> torch.Tensor:
    """Pixels that a photo of such a tar must have."""
    return fit(decode_photo(jpeg(seed=seed)), SIDE)


def released(batch: Batch) -> Batch:
    """A batch that was given back."""
    batch.release()
    return batch
