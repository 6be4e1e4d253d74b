"""What the commands embed and predict do: load the parts, open the ledger, run the engine, sum up."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    return _run_photos(config.shards, config.out, config.run, config.encoder, config.stream, None, embeddings=True)


def predict(config: PredictConfig, *, inputs: Sequence[str] = ()) -> Summary:
    """Locate the photos of shards, or those whose embeddings were stored.

    Args:
        config: `out` must be set.
        inputs: what the shards were packed from, where that was done on the fly; pinned with the config.
    """
    if not config.out:
        raise OutputError("--out is missing: name the folder for the predictions")
    if config.from_embeddings:
        return _run_stored(config)
    return _run_photos(
        config.shards,
        config.out,
        config.run,
        config.encoder,
        config.stream,
        config.locate,
        embeddings=config.save_embeddings,
        inputs=inputs,
    )


def _run_photos(
    shards: Sequence[str],
    out: str,
    run: RunConfig,
    encoder_config: EncoderConfig,
    stream: StreamConfig,
    locate: LocateConfig | None,
    *,
    embeddings: bool,
    inputs: Sequence[str] = (),
) -> Summary:
    units = plan_units(expand_shards(shards), limit=run.limit)
    worker = this_worker()
    encoder = _load(encoder_config, worker)
    locators = _locators(locate, encoder.dim, encoder.tap, encoder.sha256, worker.device)
    pinned = {
        **_pinned(run, locate, locators, embeddings=embeddings),
        **_pinned_encoder(encoder),
        "apply_orientation": stream.apply_orientation,
        "max_pixels": stream.max_pixels,
    }
    if inputs:
        pinned["inputs"] = list(inputs)
    adoptable = [
        name
        for name, is_left_open in {
            "precision": encoder_config.precision == "auto",
            "compile": encoder_config.compile == "auto",
            "batch_size": encoder_config.batch_size == 0,
        }.items()
        if is_left_open
    ]
    ledger = Ledger(Path(out))
    try:
        effective = ledger.open(pinned, adoptable=adoptable)
        if any(effective[name] != pinned[name] for name in adoptable):
            log.info("adopting what the first rank pinned: %s", {name: effective[name] for name in adoptable})
            encoder = _load(_adopt(encoder_config, effective), worker)
        log.info("encoder: %s", encoder.summary())
        with StopSignal() as stop:
            source = PhotoSource(encoder, stream, stop)
            return _drive(ledger, units, source, _outputs(locators, embeddings), locators, run, worker, stop)
    finally:
        ledger.close()


def _run_stored(config: PredictConfig) -> Summary:
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
    ledger = Ledger(Path(config.out))
    try:
        ledger.open(pinned)
        with StopSignal() as stop:
            source = StoredSource(worker.device)
            return _drive(ledger, units, source, _outputs(locators, False), locators, config.run, worker, stop)
    finally:
        ledger.close()


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
        pinned["heads"] = [{"name": locator.name, **locator.identity} for locator in locators]
    return pinned


def _pinned_encoder(encoder: Encoder) -> dict[str, Any]:
    return {
        "encoder_sha256": encoder.sha256,
        "encoder_fingerprint": encoder.fingerprint,
        "tap": encoder.tap,
        "dim": encoder.dim,
        "image_size": encoder.image_size,
        "precision": encoder.precision,
        "compile": encoder.compiled,
        "batch_size": encoder.batch_size,
    }
