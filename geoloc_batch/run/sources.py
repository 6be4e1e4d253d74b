"""Where features come from: photos through the encoder, or embeddings that were stored before.

Shape letters: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from geoloc_batch.errors import InputError, StopRequested
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.records import Sample, Unit, UnitEnd, UnitError
from geoloc_batch.run.first_batch import FirstBatch
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.transfer import Features, Flight, Landed, transfer_for
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.store.features import read_features
from geoloc_batch.store.pin import RUN_FILE, read_config
from geoloc_batch.store.remains import find_remains
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.config import StreamConfig


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features of real photos alone, on their way: padding is dropped."""

    flight: Flight
    """Gives [B, D]."""
    samples: tuple[Sample, ...]
    """B of them."""


Items: TypeAlias = Generator[FeatureBatch | UnitEnd, None, None]


class FeatureSource(Protocol):
    """Gives features of units, and says when a unit is through."""

    @property
    def precision(self) -> str:
        """Of the arithmetic that the features came from."""
        ...

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        """Read `units` as they come; None among them asks to hand over what is only partly filled."""
        ...

    @property
    def wider(self) -> Callable[[], FeatureSource] | None:
        """Makes a source of the same units in a precision of wider range; None where that would gain nothing."""
        ...


class PhotoSource:
    """Shards of photos through the encoder.

    Args:
        encoder: its batch size and image size shape the stream's batches.
        config: of the stream.
        stop: when it is set, the stream is closed even while it waits for a slow shard.
        make_wider: makes the encoder in a precision of wider range; called once, when a unit needs it. None where the
            encoder's own is wide enough.
        sample: is shown the first batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: StreamConfig,
        stop: StopSignal,
        *,
        make_wider: Callable[[], Encoder] | None = None,
        sample: FirstBatch | None = None,
    ) -> None:
        self.precision = encoder.precision
        self._encoder = encoder
        self._config = config
        self._stop = stop
        self.wider: Callable[[], FeatureSource] | None = None
        if make_wider is not None:
            self.wider = cache(lambda: PhotoSource(make_wider(), config, stop))
        self._sample = sample
        self._transfer = transfer_for(encoder)

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
        telemetry.begin_stream()
        with closing(stream), self._stop.calling(stream.close):
            while True:
                with telemetry.stage("wait"):
                    item = next(items, None)
                telemetry.observe(stream.stats())
                if item is None or self._stop.is_set():
                    return
                if isinstance(item, Batch):
                    try:
                        with telemetry.stage("encode"):
                            flight = self._start(item)
                    except StopRequested:
                        # While another process compiles the same encoder, which may take minutes.
                        return
                    yield FeatureBatch(flight, item.samples)
                else:
                    yield item

    def _start(self, batch: Batch) -> Flight:
        sample, self._sample = self._sample, None
        return self._transfer.start(batch) if sample is None else sample.watch(batch, self._transfer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What stored embeddings are."""

    dim: int
    tap: str
    encoder_sha256: str | None
    """None for a folder that another tool wrote."""
    num_missing: int = 0
    """Units of the run that wrote it which are not there: not done yet, or done and with files that are gone."""
    lost: str = ""
    """The first of the files that are gone."""


def origin_of(folder: str | Path, units: Sequence[Unit], *, tap: str) -> Origin:
    """What the embeddings in `folder` are: by its run.json, or, where another tool wrote it, by their shape and `tap`.

    Raises:
        InputError: the first pair cannot be read.
        OutputError: run.json cannot be read.
    """
    dim = read_features(units[0].source).num_features
    if not (Path(folder) / RUN_FILE).is_file():
        return Origin(dim=dim, tap=tap, encoder_sha256=None)
    config, remains = read_config(Path(folder)), find_remains(Path(folder))
    return Origin(
        dim=dim,
        tap=str(config["tap"]),
        encoder_sha256=str(config["encoder_sha256"]),
        num_missing=remains.num_undone + remains.num_harmed,
        lost=remains.lost,
    )


class StoredSource:
    """Embeddings that `geoloc embed` or `--save-embeddings` wrote.

    Args:
        device: where the features go.
        batch_size: rows per step.
    """

    precision = "fp32"
    wider = None

    def __init__(self, device: torch.device, *, batch_size: int = 4096) -> None:
        self._device = device
        self._batch_size = batch_size

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        """As the protocol says; a pair that cannot be read is a unit error."""
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
                with telemetry.stage("read"):
                    features_BD = stored.features(start, stop)
                    flight = Landed(Features(features_BD, torch.from_numpy(features_BD).to(self._device)))
                    samples = tuple(stored.samples(unit, start, stop))
                yield FeatureBatch(flight, samples)
                done = stop
        except (InputError, OSError) as failure:
            error = UnitError(unit.shard, str(failure), -1, None, retryable=True)
        yield UnitEnd(unit, done, unit_error=error)
