"""Where features come from: photos through the encoder, or embeddings that were stored before.

Shape letters: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from geoloc_batch.errors import InputError
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.records import Sample, Unit, UnitEnd, UnitError
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.store.features import read_features
from geoloc_batch.store.pin import RUN_FILE, read_config
from geoloc_batch.store.status import status
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.config import StreamConfig


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features of real photos alone: padding is dropped."""

    features_BD: Tensor
    """[B, D] float32 on the run's device, as the tap gives them, never normalised."""
    samples: tuple[Sample, ...]
    """B of them."""


Items: TypeAlias = Generator[FeatureBatch | UnitEnd, None, None]


class FeatureSource(Protocol):
    """Gives features of units, and says when a unit is through."""

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        """Read `units` as they come; None among them asks to hand over what is only partly filled."""
        ...


class PhotoSource:
    """Shards of photos through the encoder.

    Args:
        encoder: its batch size and image size shape the stream's batches.
        config: of the stream.
        stop: when it is set, the stream is closed even while it waits for a slow shard.
    """

    def __init__(self, encoder: Encoder, config: StreamConfig, stop: StopSignal) -> None:
        self._encoder = encoder
        self._config = config
        self._stop = stop

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        """As the protocol says; each step of the encoder sees one fixed shape."""
        encoder = self._encoder
        stream = BatchStream(
            units,
            side=encoder.image_size,
            batch_size=encoder.batch_size,
            config=self._config,
            pin_memory=encoder.device.type == "cuda",
        )
        items = iter(stream)
        with closing(stream), self._stop.calling(stream.close):
            while True:
                with telemetry.stage("wait"):
                    item = next(items, None)
                _measure(stream, telemetry)
                if item is None or self._stop.is_set():
                    return
                if isinstance(item, Batch):
                    with telemetry.stage("encode"):
                        features = self._encode(item)
                    yield features
                else:
                    yield item

    def _encode(self, batch: Batch) -> FeatureBatch:
        pixels = batch.pixels.to(self._encoder.device, non_blocking=True)
        if pixels.device.type == "cuda":
            # The buffer goes back to the decoders once it has been copied, long before the encoder is through with it.
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            features = self._encoder.encode(pixels)
            copied.synchronize()
        else:
            features = self._encoder.encode(pixels)
        batch.release()
        return FeatureBatch(features[: len(batch.samples)], batch.samples)


def _measure(stream: BatchStream, telemetry: Telemetry) -> None:
    stats = stream.stats()
    decode_share = stats.decode_busy_s / max(1, stats.decode_threads)
    telemetry.stream_stage = "read" if stats.read_busy_s > decode_share else "decode"
    telemetry.bytes_read = stats.bytes_read
    telemetry.extra["stream"] = {
        "read_busy_s": round(stats.read_busy_s, 3),
        "decode_busy_s": round(stats.decode_busy_s, 3),
        "decode_threads": stats.decode_threads,
        "photos": stats.photos,
        "bytes_read": stats.bytes_read,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What stored embeddings are."""

    dim: int
    tap: str
    encoder_sha256: str | None
    """None for a folder that another tool wrote."""
    num_missing: int = 0
    """Units of the run that wrote it which are not there yet."""


def origin_of(folder: str | Path, units: Sequence[Unit], *, tap: str) -> Origin:
    """What the embeddings in `folder` are: by its run.json, or, where another tool wrote it, by their shape and `tap`.

    Raises:
        InputError: the first pair cannot be read.
        OutputError: run.json cannot be read.
    """
    dim = read_features(units[0].source).num_features
    if not (Path(folder) / RUN_FILE).is_file():
        return Origin(dim=dim, tap=tap, encoder_sha256=None)
    config, run = read_config(Path(folder)), status(folder)
    return Origin(
        dim=dim,
        tap=str(config["tap"]),
        encoder_sha256=str(config["encoder_sha256"]),
        num_missing=run.units - run.done,
    )


class StoredSource:
    """Embeddings that `geoloc embed` or `--save-embeddings` wrote.

    Args:
        device: where the features go.
        batch_size: rows per step.
    """

    def __init__(self, device: torch.device, *, batch_size: int = 4096) -> None:
        self._device = device
        self._batch_size = batch_size

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        """As the protocol says; a pair that cannot be read is a unit error."""
        telemetry.stream_stage = "read"
        for unit in units:
            if unit is not None:
                yield from self._unit(unit, telemetry)
                telemetry.bytes_read += unit.num_bytes

    def _unit(self, unit: Unit, telemetry: Telemetry) -> Items:
        done, error = 0, None
        try:
            stored = read_features(unit.source)
            num_rows = stored.num_rows if unit.max_rows is None else min(unit.max_rows, stored.num_rows)
            for start in range(0, num_rows, self._batch_size):
                stop = min(start + self._batch_size, num_rows)
                with telemetry.stage("wait"):
                    features_BD = torch.from_numpy(stored.features(start, stop)).to(self._device)
                    samples = tuple(stored.samples(unit, start, stop))
                yield FeatureBatch(features_BD, samples)
                done = stop
        except (InputError, OSError) as failure:
            error = UnitError(unit.shard, str(failure), -1, None, retryable=True)
        yield UnitEnd(unit, done, unit_error=error)
