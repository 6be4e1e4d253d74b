"""Fidelity: how far a precision's features and places are from those of fp32, on photos of the user's own.

Shape letters: N photos, D features, K cells kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoloc_batch.errors import ConfigError, InputError
from geoloc_batch.geo.located import Located
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.factory import build_locators
from geoloc_batch.locate.locator import Locator
from geoloc_batch.locate.requests import find_requests
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.model.hub import fetch
from geoloc_batch.records import UnitEnd
from geoloc_batch.run.config import FidelityConfig
from geoloc_batch.run.encoders import REFERENCE, Features, explained_shortage, load, reference_of
from geoloc_batch.run.workers import StopSignal, this_worker
from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.shards import expand_shards, plan_units

log = logging.getLogger("geoloc_batch")

_DEFAULT_LOWER = "bf16"
_TOP_K = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceFidelity:
    """What a head makes of both."""

    head: str
    top_1_percent: float
    """Photos whose most probable cell is the same."""
    top_5_percent: float
    """Of fp32's five most probable cells, how many are among the precision's five; mean over the photos."""
    median_shift_km: float
    """Between the two posterior means."""
    p99_shift_km: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFidelity:
    """One precision against fp32."""

    precision: str
    photos: int
    """Compared: what follows is over these."""
    not_finite: int
    """Photos left out because the precision gave features that are not finite."""
    cosine_min: float
    cosine_mean: float
    max_relative_error: float
    """Largest distance of a feature from that of fp32, relative to the latter's length."""
    heads: tuple[PlaceFidelity, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityReport:
    """What `geoloc fidelity` found."""

    encoder: str
    device: str
    errors: int
    """Photos that could not be read or decoded."""
    found: FeatureFidelity


def compare(
    precision: str,
    lower_ND: NDArray[np.float32],
    reference_ND: NDArray[np.float32],
    locators: Sequence[Locator] = (),
) -> FeatureFidelity | None:
    """Figures over photos.

    Args:
        precision: of `lower_ND`.
        lower_ND: [N, D] raw features.
        reference_ND: [N, D] those of the same photos in fp32.
        locators: to be asked for the places of both.

    Returns:
        The figures; None where there is not one photo with finite features in both.
    """
    lower, reference = lower_ND.astype(np.float64), reference_ND.astype(np.float64)
    lengths_N2 = np.linalg.norm(np.stack([lower, reference], axis=1), axis=2)
    is_sound_N = (np.isfinite(lengths_N2) & (lengths_N2 > 0)).all(axis=1)
    if not is_sound_N.any():
        return None
    lower, reference, lengths_N2 = lower[is_sound_N], reference[is_sound_N], lengths_N2[is_sound_N]
    # Products of rounded lengths may end a hair above 1.
    cosine_N = np.minimum(np.einsum("nd,nd->n", lower, reference) / lengths_N2.prod(axis=1), 1.0)
    error_N = np.linalg.norm(lower - reference, axis=1) / lengths_N2[:, 1]
    both = [torch.from_numpy(features_ND[is_sound_N]) for features_ND in (lower_ND, reference_ND)]
    return FeatureFidelity(
        precision=precision,
        photos=int(is_sound_N.sum()),
        not_finite=int((~np.isfinite(lower_ND).all(axis=1)).sum()),
        cosine_min=float(cosine_N.min()),
        cosine_mean=float(cosine_N.mean()),
        max_relative_error=float(error_N.max()),
        heads=tuple(_compare_places(locator.name, *map(locator.locate, both)) for locator in locators),
    )


def _compare_places(head: str, lower: Located, reference: Located) -> PlaceFidelity:
    lower_NK, reference_NK = lower.topk_cell[:, :_TOP_K], reference.topk_cell[:, :_TOP_K]
    is_kept_NK = (reference_NK[:, :, None] == lower_NK[:, None, :]).any(axis=2)
    shift_km_N = haversine_km(lower.mean_deg, reference.mean_deg)
    return PlaceFidelity(
        head=head,
        top_1_percent=float(100 * (lower_NK[:, 0] == reference_NK[:, 0]).mean()),
        top_5_percent=float(100 * is_kept_NK.mean()),
        median_shift_km=float(np.median(shift_km_N)),
        p99_shift_km=float(np.percentile(shift_km_N, 99)),
    )


def measure_fidelity(config: FidelityConfig) -> FidelityReport:
    """Encode photos twice, in the precision that is asked for and in fp32, and compare.

    Nothing is written. Ctrl-C ends it early and compares what was seen so far.

    Raises:
        UserError: a flag, the shards, the checkpoint, a head or its cells cannot be used; or no photo could be read.
        HubError: a file had to be downloaded and could not be.
        GeolocError: the device's memory ended.
    """
    if config.encoder.precision == REFERENCE:
        raise ConfigError(f"--precision {REFERENCE} is what others are compared with; give bf16 or fp16")
    with StopSignal() as stop:
        # Before anything is loaded: a shard that is misspelt is told at once.
        units = plan_units(expand_shards(config.shards), limit=config.limit)
        if config.head:
            find_requests(_locate_config(config))
        device = this_worker().device
        lower = load(config.encoder, device)
        if lower.precision == REFERENCE:
            log.info("--precision auto is %s here: %s is compared", REFERENCE, _DEFAULT_LOWER)
            lower = lower.at_precision(_DEFAULT_LOWER)
        lower.is_stopped = stop.is_set
        log.info("encoder: %s", lower.summary())
        locators = _locators(config, lower)
        stream = BatchStream(units, side=lower.image_size, batch_size=lower.batch_size, config=config.stream)
        stop.defer()
        with closing(stream), stop.calling(stream.close), explained_shortage(lower, "pass a smaller one"):
            both, num_errors = _encode_both(stream, lower, reference_of(lower))
    found = compare(lower.precision, *both, locators) if len(both[0]) else None
    if found is None:
        raise InputError(f"{' '.join(config.shards)}: there is no photo to compare; {num_errors} could not be read")
    return FidelityReport(encoder=lower.name, device=str(device), errors=num_errors, found=found)


def _locate_config(config: FidelityConfig) -> LocateConfig:
    return LocateConfig(head=config.head, cells=config.cells, top_k=_TOP_K)


def _locators(config: FidelityConfig, encoder: Encoder) -> list[Locator]:
    if not config.head:
        return []
    return build_locators(
        _locate_config(config),
        encoder_dim=encoder.dim,
        encoder_tap=encoder.tap,
        encoder_sha256=encoder.sha256,
        device=encoder.device,
        fetch=fetch,
    )


def _encode_both(
    stream: BatchStream, lower: Encoder, reference: Features
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], int]:
    """[N, D] twice, the rows of the same photos, and how many photos were refused."""
    parts: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    num_errors = 0
    for item in stream:
        if isinstance(item, UnitEnd):
            num_errors += len(item.errors)
            if item.unit_error is not None:
                log.warning("%s: %s", item.unit.source, item.unit_error.message)
            continue
        pixels, count = item.pixels.to(lower.device), len(item.samples)
        first, second = (encode(pixels)[:count].cpu().numpy() for encode in (lower.encode, reference))
        parts.append((first, second))
        item.release()
    if not parts:
        return (np.empty((0, lower.dim), np.float32), np.empty((0, lower.dim), np.float32)), num_errors
    firsts, seconds = zip(*parts, strict=True)
    return (np.concatenate(firsts), np.concatenate(seconds)), num_errors


def format_fidelity(report: FidelityReport) -> str:
    """A report as lines for a terminal."""
    found = report.found
    lines = [
        f"{found.precision} against {REFERENCE} on {found.photos} photos, {report.device}, {report.encoder}",
        f"  cosine          {found.cosine_min:.6f} at least, {found.cosine_mean:.6f} on average",
        f"  feature error   {found.max_relative_error:.2e} of its length at most",
    ]
    if found.not_finite:
        lines.append(f"  not finite      {found.not_finite} photos, left out of all figures")
    if report.errors:
        lines.append(f"  not read        {report.errors} photos")
    if found.heads:
        width = max(4, *(len(place.head) for place in found.heads))
        lines += ["", f"{'head':<{width}}  {'same top 1':>10}  {'same top 5':>10}  {'median shift':>14}  {'99 %':>12}"]
        lines += [
            f"{place.head:<{width}}  {place.top_1_percent:8.2f} %  {place.top_5_percent:8.2f} %  "
            f"{place.median_shift_km:11.3f} km  {place.p99_shift_km:9.3f} km"
            for place in found.heads
        ]
    return "\n".join(lines)


def as_json(report: FidelityReport) -> dict[str, Any]:
    """A report as the last line on stdout has it."""
    return {"encoder": report.encoder, "device": report.device, "errors": report.errors, **asdict(report.found)}
