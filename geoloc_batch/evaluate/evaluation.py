"""Evaluation: the metrics, what the tables were like, and how both are shown."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from geoloc_batch.geo.metrics import Metrics
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Rows of both tables, and why some of them are not compared."""

    predictions: int
    """Rows, of whatever kind."""
    predictions_without_place: int
    """lat or lon is missing or NaN: not predicted."""
    predictions_out_of_range: int
    """Likewise where they are no place on Earth."""
    predictions_at_null_island: int
    """At exactly (0, 0); they are compared."""
    predictions_without_truth: int
    """No row of the truth, or none with a place, has their key: left out."""
    truth: int
    """Rows, of whatever kind."""
    truth_without_place: int
    """Left out, and not counted as asked."""
    truth_out_of_range: int
    """Likewise."""
    truth_at_null_island: int
    """Compared."""
    truth_without_prediction: int
    """True places that were asked for, and have no prediction or one without a place."""
    error_rows: int
    """Photos that the run could not predict, where the truth is the photos' own: they were asked for as well."""
    units_not_done: int | None
    """Units of the run that wait or are at work. None where the predictions are of no run, or it cannot tell."""
    unit_errors: int | None
    """Done units that were not read to their end; likewise."""
    is_swapped: bool
    """Most rows come closer when lat and lon of one side are swapped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `geoloc evaluate` ends with."""

    metrics: Metrics
    counts: Counts
    warnings: tuple[str, ...]
    predictions: str
    truth: str
    cells: str
    """The partition that says which the true cells are, "" where the truth says so itself or nobody does."""
    out: str

    def by_name(self) -> dict[str, object]:
        """The metrics, the counts and the files by name: the last line on stdout. Shares are percent."""
        files = {"predictions_file": self.predictions, "truth_file": self.truth, "cells_file": self.cells or None}
        return {**self.metrics.by_name(), **dataclasses.asdict(self.counts), **files, "out": self.out}


def format_table(evaluation: Evaluation) -> str:
    """The metrics as a Markdown table that can be read as it is, and what they rest on."""
    metrics = evaluation.metrics
    rows = [
        ("top-1 cell accuracy", _percent(metrics.top_1)),
        ("top-5 cell accuracy", _percent(metrics.top_5)),
        ("median error", f"{metrics.median_km:.1f} km"),
        ("mean error", f"{metrics.mean_km:.1f} km"),
        *((band.name.replace("_", " "), _percent(band.percent)) for band in metrics.bands),
        ("balscore", f"{metrics.balscore:.1f}"),
        ("GeoScore", f"{metrics.geoscore:.0f}"),
        ("coverage", _percent(metrics.coverage)),
    ]
    rows = [(name, value) for name, value in rows if value]
    names, values = (max(len(row[side]) for row in [("metric", "value"), *rows]) for side in (0, 1))
    lines = [f"| {'metric':<{names}} | {'value':>{values}} |", f"|{'-' * (names + 2)}|{'-' * (values + 1)}:|"]
    lines += [f"| {name:<{names}} | {value:>{values}} |" for name, value in rows]
    return "\n".join([*lines, "", _basis(metrics)])


def _basis(metrics: Metrics) -> str:
    text = f"{metrics.rows} of {metrics.asked} rows; within: distance {metrics.comparison} threshold"
    text += f", on a ball of {EARTH_RADIUS_KM:g} km; balscore: cube root of within 25 x 200 x 750 km; "
    if metrics.cell_rows:
        return text + f"the true cell is known for {metrics.cell_rows} rows"
    return text + "the true cells are not known (a column cell on both sides, or --cells FILE)"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
