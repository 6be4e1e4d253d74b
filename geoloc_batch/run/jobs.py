"""What the commands embed and predict do: load the parts, open the ledger, run the engine, sum up."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from geoloc_batch.errors import OutputError
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.factory import build_locators
from geoloc_batch.locate.locator import Locator
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.encoder import Encoder, load_encoder
from geoloc_batch.model.hub import fetch
from geoloc_batch.records import Unit
from geoloc_batch.run.config import EmbedConfig, PredictConfig, RunConfig, Summary
from geoloc_batch.run.engine import Engine, Outputs
from geoloc_batch.run.sources import FeatureSource, PhotoSource, StoredSource, origin_of
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.workers import StopSignal, Worker, this_worker
from geoloc_batch.store.features import plan_embeddings, read_features
from geoloc_batch.store.ledger import Ledger, Totals
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.shards import expand_shards, plan_units

log = logging.getLogger("geoloc_batch")

SCHEMA_VERSION = 1
EXIT_COMPLETE, EXIT_WITH_ERRORS, EXIT_INCOMPLETE = 0, 3, 75


def embed(config: EmbedConfig) -> Summary:
    """Turn shards into embeddings. Errors as in geoloc_batch.errors."""
    job = _PhotoJob(
        shards=config.shards,
        out=config.out,
        run=config.run,
        encoder=config.encoder,
        stream=config.stream,
        embeddings=True,
    )
    with StopSignal() as stop:
        return job.execute(stop)


def predict(config: PredictConfig, *, inputs: Sequence[str] = ()) -> Summary:
    """Locate the photos of shards, or those whose embeddings were stored.

    Args:
        config: `out` must be set.
        inputs: what the shards were packed from, where that was done on the fly; pinned with the config.
    """
    if not config.out:
        raise OutputError("--out is missing: name the folder for the predictions")
    with StopSignal() as stop:
        if config.from_embeddings:
            return _predict_stored(config, stop)
        job = _PhotoJob(
            shards=config.shards,
            out=config.out,
            run=config.run,
            encoder=config.encoder,
            stream=config.stream,
            embeddings=config.save_embeddings,
            locate=config.locate,
            inputs=inputs,
        )
        return job.execute(stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PhotoJob:
    """From shards of photos to what is asked for."""

    shards: Sequence[str]
    out: str
    run: RunConfig
    encoder: EncoderConfig
    stream: StreamConfig
    embeddings: bool
    locate: LocateConfig | None = None
    inputs: Sequence[str] = ()

    def execute(self, stop: StopSignal) -> Summary:
        units = plan_units(expand_shards(self.shards), limit=self.run.limit)
        worker = this_worker()
        encoder = _load(self.encoder, worker)
        locators = _locators(self.locate, encoder.dim, encoder.tap, encoder.sha256, worker.device)
        pinned = self._pinned(encoder, locators)
        with closing(Ledger(self.out, beat_s=self.run.heartbeat_s)) as ledger:
            adoptable = self._left_open()
            effective = ledger.open(pinned, adoptable=adoptable)
            if any(effective[name] != pinned[name] for name in adoptable):
                log.info("adopting what the first rank pinned: %s", {name: effective[name] for name in adoptable})
                encoder = _load(_adopt(self.encoder, effective), worker)
            log.info("encoder: %s", encoder.summary())
            source = PhotoSource(encoder, self.stream, stop)
            outputs = _outputs(locators, self.embeddings)
            return _drive(ledger, units, source, outputs, locators, self.run, worker, stop)

    def _pinned(self, encoder: Encoder, locators: Sequence[Locator]) -> dict[str, Any]:
        """Everything that decides what the rows are."""
        pinned = {
            **_pinned(self.run, self.locate, locators, embeddings=self.embeddings),
            "encoder_sha256": encoder.sha256,
            "encoder_fingerprint": encoder.fingerprint,
            "tap": encoder.tap,
            "dim": encoder.dim,
            "image_size": encoder.image_size,
            "precision": encoder.precision,
            "compile": encoder.compiled,
            "batch_size": encoder.batch_size,
            "apply_orientation": self.stream.apply_orientation,
            "max_pixels": self.stream.max_pixels,
        }
        if self.inputs:
            pinned["inputs"] = list(self.inputs)
        return pinned

    def _left_open(self) -> list[str]:
        """Settings that the user left to us: those of the first rank hold for all."""
        is_left_open = {
            "precision": self.encoder.precision == "auto",
            "compile": self.encoder.compile == "auto",
            "batch_size": self.encoder.batch_size == 0,
        }
        return [name for name, is_open in is_left_open.items() if is_open]


def _predict_stored(config: PredictConfig, stop: StopSignal) -> Summary:
    """From stored embeddings to places."""
    units = _limited(plan_embeddings(config.from_embeddings), config.run.limit)
    worker = this_worker()
    origin = origin_of(config.from_embeddings, units, tap=config.encoder.tap)
    locators = _locators(config.locate, origin.dim, origin.tap, origin.encoder_sha256, worker.device)
    pinned = {
        **_pinned(config.run, config.locate, locators, embeddings=False),
        "encoder_sha256": origin.encoder_sha256,
        "tap": origin.tap,
        "from_embeddings": True,
    }
    with closing(Ledger(config.out, beat_s=config.run.heartbeat_s)) as ledger:
        ledger.open(pinned)
        outputs = _outputs(locators, embeddings=False)
        source = StoredSource(worker.device)
        summary = _drive(ledger, units, source, outputs, locators, config.run, worker, stop)
    if origin.num_missing and config.run.limit is None:
        log.warning(
            "%s is not complete: %d of its units are missing; finish it, then run the same command again",
            config.from_embeddings,
            origin.num_missing,
        )
        return dataclasses.replace(summary, exit_code=EXIT_INCOMPLETE)
    return summary


def _limited(units: Sequence[Unit], limit: int | None) -> list[Unit]:
    """The units that hold the first `limit` stored rows; the last of them is cut."""
    if limit is None:
        return list(units)
    taken: list[Unit] = []
    for unit in units:
        if limit <= 0:
            break
        taken.append(dataclasses.replace(unit, max_rows=limit))
        limit -= read_features(unit.source).num_rows
    return taken


def _drive(
    ledger: Ledger,
    units: Sequence[Unit],
    source: FeatureSource,
    outputs: Outputs,
    locators: Sequence[Locator],
    run: RunConfig,
    worker: Worker,
    stop: StopSignal,
) -> Summary:
    """Run the engine over what is left of the plan, and sum up."""
    plan = ledger.adopt_plan(units)
    for warning in ledger.warnings:
        log.warning("%s", warning)
    stop.defer()
    telemetry = Telemetry(
        ledger.out / "_logs" / f"{worker.name}.jsonl", total_bytes=sum(unit.num_bytes for unit in plan)
    )
    try:
        Engine(ledger, outputs, locators, telemetry, stop).run(source)
    finally:
        telemetry.close()
    totals = ledger.totals()
    return Summary(
        units=totals.units,
        samples=totals.samples,
        rows=totals.rows,
        errors=totals.errors,
        unit_errors=totals.units_failed,
        seconds=round(telemetry.seconds, 3),
        images_per_second=round(telemetry.images_per_second(), 3),
        limiting_stage=telemetry.limiting_stage(),
        out=str(ledger.out),
        exit_code=_exit_code(totals, run.max_error_rate),
    )


def _exit_code(totals: Totals, max_error_rate: float) -> int:
    if totals.done < totals.units:
        return EXIT_INCOMPLETE
    if totals.units_failed or totals.errors > max_error_rate * totals.samples:
        return EXIT_WITH_ERRORS
    return EXIT_COMPLETE


def _load(config: EncoderConfig, worker: Worker) -> Encoder:
    return load_encoder(
        config.encoder,
        tap=config.tap,
        precision=config.precision,
        batch_size=config.batch_size,
        compile=config.compile,
        device=worker.device,
    )


def _adopt(config: EncoderConfig, effective: Mapping[str, Any]) -> EncoderConfig:
    return dataclasses.replace(
        config,
        precision=effective["precision"],
        compile="on" if effective["compile"] else "off",
        batch_size=effective["batch_size"],
    )


def _locators(
    config: LocateConfig | None, dim: int, tap: str, encoder_sha256: str | None, device: torch.device
) -> list[Locator]:
    if config is None:
        return []
    return build_locators(
        config, encoder_dim=dim, encoder_tap=tap, encoder_sha256=encoder_sha256, device=device, fetch=fetch
    )


def _outputs(locators: Sequence[Locator], embeddings: bool) -> Outputs:
    trees = tuple(locator.name for locator in locators) if len(locators) > 1 else ("",) * len(locators)
    return Outputs(embeddings=embeddings, trees=trees)


def _pinned(
    run: RunConfig, locate: LocateConfig | None, locators: Sequence[Locator], *, embeddings: bool
) -> dict[str, Any]:
    pinned: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "limit": run.limit, "embeddings": embeddings}
    if locate is not None:
        pinned |= {"top_k": locate.top_k, "position": locate.position}
        # A name counts where it names a folder of results: among several.
        names = [{"name": locator.name} if len(locators) > 1 else {} for locator in locators]
        pinned["heads"] = [{**name, **locator.identity} for name, locator in zip(names, locators, strict=True)]
    return pinned
