"""What the commands embed, predict and retry do: load the parts, open the ledger, let it be driven."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_WITH_ERRORS, ConfigError, OutputError
from geoloc_batch.locate.locator import Locator
from geoloc_batch.locate.requests import find_requests
from geoloc_batch.model.attention import DEFAULT
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.records import Unit
from geoloc_batch.run.command import read_command, record_command
from geoloc_batch.run.config import EmbedConfig, PredictConfig, RetryConfig, Summary
from geoloc_batch.run.drive import Adopt, drive, explained_full_disk
from geoloc_batch.run.encoders import (
    REFERENCE,
    adopt_settings,
    explained_shortage,
    left_open,
    load,
    wider_precision,
)
from geoloc_batch.run.first_batch import FirstBatch
from geoloc_batch.run.first_rank import agreed
from geoloc_batch.run.parts import locators_of, outputs_of, pinned_of
from geoloc_batch.run.sources import PhotoSource
from geoloc_batch.run.stored import predict_stored
from geoloc_batch.run.workers import StopSignal, Worker, this_worker
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.pin import read_config, refuse_object_store
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.shards import expand_shards, plan_units

log = logging.getLogger("geoloc_batch")


def embed(config: EmbedConfig) -> Summary:
    """Turn shards into embeddings. Errors as in geoloc_batch.errors."""
    with StopSignal() as stop:
        return _PhotoJob(config).execute(stop)


def predict(config: PredictConfig, *, inputs: Sequence[str] = ()) -> Summary:
    """Locate the photos of shards, or those whose embeddings were stored.

    Args:
        config: `out` must be set.
        inputs: what the shards were packed from, where that was done on the fly; pinned with the config.
    """
    if not config.out:
        # A photo that is misspelt needs no --out: what is absent is told first.
        expand_shards(config.shards)
        raise OutputError("--out is missing: name the folder for the predictions")
    if config.from_embeddings:
        _refuse_idle(config)
    with StopSignal() as stop:
        if config.from_embeddings:
            return predict_stored(config, stop)
        return _PhotoJob(config, inputs).execute(stop)


def _refuse_idle(config: PredictConfig) -> None:
    """Raise ConfigError for flags that only reading and encoding photos heeds. A default is nothing that was given."""
    # 0 is auto, spelt otherwise. Of another tool's folder nobody knows the tap.
    encoder = dataclasses.replace(config.encoder, batch_size=config.encoder.given_batch_size or "auto", tap="pooled")
    idle = [
        f"--{field.name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for part, default in ((encoder, EncoderConfig()), (config.stream, StreamConfig()))
        for field in dataclasses.fields(part)
        if (value := getattr(part, field.name)) != getattr(default, field.name)
    ]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)}: no part in --from-embeddings, which reads and encodes no photo; leave "
            f"{'it' if len(idle) == 1 else 'them'} out"
        )


def retry(config: RetryConfig) -> Summary:
    """Execute units of an OUT once more, with the command that made it. Errors as in geoloc_batch.errors."""
    refuse_object_store(config.out)
    read_config(Path(config.out))
    command = read_command(Path(config.out))
    given = _moved(command.config, config)
    left_out: list[str] = []
    adopt = partial(_adopt_retries, config, left_out)
    with StopSignal() as stop:
        if isinstance(given, PredictConfig) and given.from_embeddings:
            summary = predict_stored(given, stop, adopt)
        else:
            summary = _PhotoJob(given, command.inputs).execute(stop, adopt)
    kept = summary.kept + len(left_out)
    # Who names a unit asks for it to be made again: that it was not is no success.
    is_unmended = bool(config.unit) and kept > 0 and summary.exit_code == EXIT_COMPLETE
    return dataclasses.replace(summary, kept=kept, exit_code=EXIT_WITH_ERRORS if is_unmended else summary.exit_code)


def _moved(command: EmbedConfig | PredictConfig, config: RetryConfig) -> EmbedConfig | PredictConfig:
    """The command with its parts where the user says that they are now."""
    if config.encoder:
        if isinstance(command, PredictConfig) and command.from_embeddings:
            raise ConfigError(f"{config.out} was made from stored embeddings, without an encoder; leave out --encoder")
        command = dataclasses.replace(command, encoder=dataclasses.replace(command.encoder, encoder=config.encoder))
    if isinstance(command, PredictConfig):
        locate = command.locate
        locate = dataclasses.replace(locate, head=config.head or locate.head, cells=config.cells or locate.cells)
        command = dataclasses.replace(command, locate=locate)
    elif config.head or config.cells:
        raise ConfigError(f"{config.out} was made by geoloc embed, which has no heads; leave out --head and --cells")
    return command


def _adopt_retries(config: RetryConfig, left_out: list[str], ledger: Ledger) -> Sequence[Unit]:
    is_chosen = (lambda counts: False) if config.unit else (lambda counts: counts.is_retryable)
    units = ledger.adopt_retries(is_chosen, config.unit)
    left_out += ledger.warnings
    log.info("retrying %d units", len(units))
    return units


class _PhotoJob:
    """From shards of photos to what is asked for."""

    def __init__(self, config: EmbedConfig | PredictConfig, inputs: Sequence[str] = ()) -> None:
        self.config, self.inputs = config, inputs
        self.run, self.encoder, self.stream = config.run, config.encoder, config.stream
        self.locate = config.locate if isinstance(config, PredictConfig) else None
        self.embeddings = isinstance(config, EmbedConfig) or config.save_embeddings
        self.group_by = config.group_by if isinstance(config, PredictConfig) else ""

    def execute(self, stop: StopSignal, adopt: Adopt | None = None) -> Summary:
        """Work on the units of the shards, or on those that `adopt` takes up."""
        is_retry = adopt is not None
        if self.locate is not None:
            # Before anything is loaded or downloaded: a head that is misspelt is told at once.
            find_requests(self.locate)
        if adopt is None:
            # Before anything is loaded: a shard that is misspelt is told at once.
            units = plan_units(expand_shards(self.config.shards), limit=self.run.limit)
            adopt = partial(Ledger.adopt_plan, units=units)
        worker = this_worker()
        ledger = Ledger(self.config.out, beat_s=self.run.heartbeat_s, worker=worker.name)
        with ExitStack() as stack:
            adoptable = left_open(self.encoder)
            with agreed(self.encoder, ledger.out, worker.device, stop.is_set) as settings:
                encoder = load(settings, worker.device)
                locators = locators_of(self.locate, encoder.dim, encoder.tap, encoder.sha256, worker.device)
                pinned = self._pinned(encoder, locators)
                stack.enter_context(explained_full_disk(ledger.out))
                stack.enter_context(closing(ledger))
                effective = ledger.open(pinned, adoptable=adoptable)
            if any(effective[name] != pinned[name] for name in adoptable):
                # It pinned them while this one loaded.
                log.info("adopting what the first rank pinned: %s", {name: effective[name] for name in adoptable})
                encoder = load(adopt_settings(self.encoder, effective), worker.device)
            log.info("encoder: %s", encoder.summary())
            if not is_retry:
                record_command(ledger.out, self.config, self.inputs)
            source = self._source(encoder, locators, worker, ledger.out, stop)
            outputs = outputs_of(locators, embeddings=self.embeddings, group_by=self.group_by)
            with explained_shortage(encoder, f"pass a smaller one, and another --out: {ledger.out} was pinned to it"):
                return drive(ledger, adopt, source, outputs, locators, self.run, worker, stop)

    def _source(
        self, encoder: Encoder, locators: Sequence[Locator], worker: Worker, out: Path, stop: StopSignal
    ) -> PhotoSource:
        encoder.is_stopped = stop.is_set
        wider = wider_precision(encoder.precision, encoder.device)
        sample = None
        if encoder.precision != REFERENCE and worker.rank == 0:
            sample = FirstBatch(encoder, locators, out / "_logs" / f"{worker.name}.fidelity.json")
        make_wider = partial(encoder.at_precision, wider) if wider else None
        return PhotoSource(encoder, self.stream, stop, make_wider=make_wider, sample=sample)

    def _pinned(self, encoder: Encoder, locators: Sequence[Locator]) -> dict[str, Any]:
        """Everything that decides what the rows are."""
        pinned = {
            **pinned_of(self.run, self.locate, locators, embeddings=self.embeddings, group_by=self.group_by),
            "encoder_sha256": encoder.sha256,
            "encoder_fingerprint": encoder.fingerprint,
            "tap": encoder.tap,
            "dim": encoder.dim,
            "image_size": encoder.image_size,
            "precision": encoder.precision,
            "compile": encoder.compiled,
            "compile_mode": encoder.compile_mode if encoder.compiled else DEFAULT,
            "sdpa": encoder.sdpa,
            "batch_size": encoder.batch_size,
            "decode": "fast" if self.stream.fast_decode else "exact",
            "apply_orientation": self.stream.apply_orientation,
            "max_pixels": self.stream.max_pixels,
        }
        if self.inputs:
            pinned["inputs"] = list(self.inputs)
        return pinned
