"""What `geoloc train` does and what it ends with: a head, or a sweep of heads with a table that compares them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_INCOMPLETE
from geoloc_batch.model.arithmetic import fix_summation_order
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.train.checkpoint import SETTINGS, check_folder, locked, mark, read_json, write_json
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.group import joined_group
from geoloc_batch.train.inputs import read_inputs
from geoloc_batch.train.jobs import Job
from geoloc_batch.train.output import write_table
from geoloc_batch.train.recipes import Recipe, load_cells, recipes_of

SWEEP_MARK, SWEEP_TABLE = "sweep.json", "sweep.csv"

_KIND = "geoloc sweep"

log = logging.getLogger("geoloc_batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What `geoloc train` ends with."""

    out: str
    heads: tuple[tuple[str, Mapping[str, Any]], ...]
    """(name, head.json) of those that are done, the best on val first; the name of a single one is ""."""
    num_heads: int
    """Those that were asked for."""
    seconds: float
    is_first: bool = True
    """Whether this process speaks for all that trained together."""

    @property
    def exit_code(self) -> int:
        """0, or 75 where training was stopped."""
        return EXIT_COMPLETE if len(self.heads) == self.num_heads else EXIT_INCOMPLETE

    def by_name(self) -> dict[str, Any]:
        """The last line on stdout: the best head's metrics on test with its own position, both positions, the rest."""
        values: dict[str, Any] = {"heads": self.num_heads, "heads_done": len(self.heads)}
        if self.heads:
            name, head = self.heads[0]
            test, train = head["metrics"]["test"], head["train"]
            values |= {
                **test[head["position"]],
                "position": head["position"],
                "test": test,
                "val_balscore": _val_balscore(head),
                "epochs": train["epochs_done"],
                "best_epoch": train["best_epoch"],
                **({"best": name} if name else {}),
            }
        return {**values, "seconds": round(self.seconds, 3), "out": self.out}


def train(config: TrainConfig) -> Trained:
    """Train a head, or with --sweep one for each combination; go on where an earlier call was cut off.

    Raises:
        UserError: an input, a flag or the folder cannot be used. What is written then is at most what pins the
            settings (train.json, sweep.json), where the features themselves are at fault, and the heads before.
        GeolocError: training ran away, or the disk is full.
    """
    start = time.monotonic()
    # Before the first product: a training that goes on must give the same bits.
    fix_summation_order()
    out = Path(config.out)
    with StopSignal() as stop, joined_group() as group:
        group.from_first(lambda: check_folder(out, marks=(SWEEP_MARK,) if config.sweep else (SETTINGS,)))
        all_cells = load_cells(config.cells)
        recipes = recipes_of(config, all_cells)
        folders = {recipe.name: out / recipe.name if config.sweep else out for recipe in recipes}
        inputs = read_inputs(config, all_cells)
        job = Job(config, inputs, group, stop)
        job.agree(recipes)
        # All are compared with what they are pinned to before the first is trained.
        found = {recipe.name: job.done(recipe, folders[recipe.name]) for recipe in recipes}
        if all(head is not None for head in found.values()):
            log.info("--out %s is done: nothing is left to train", out)
        stop.defer()
        if not config.sweep:
            heads = _train_all(job, recipes, folders, found)
        else:
            with group.first_within(locked(out)):
                group.from_first(lambda: _mark_sweep(out))
                heads = _train_all(job, recipes, folders, found)
                group.from_first(lambda: _write_sweep(out, heads))
    return Trained(
        out=config.out,
        heads=tuple(heads if config.sweep else [("", head) for _, head in heads]),
        num_heads=len(recipes),
        seconds=time.monotonic() - start,
        is_first=group.is_first,
    )


def format_table(trained: Trained) -> str:
    """The heads of a sweep, one a line; or the metrics of the only head with both positions."""
    if not trained.heads:
        return "stopped before a head was done; run the same command again"
    if trained.heads[0][0]:
        return _format_sweep(trained)
    head = trained.heads[0][1]
    test, position, split = head["metrics"]["test"], head["position"], head["split"]
    named = {"top1": "best cell's centroid", "mean": "posterior mean"}
    header = ["on test", *(f"{label}{' *' if which == position else ''}" for which, label in named.items())]
    rows = [header] + [
        [label, *(_figure(test[which][name], unit) for which in named)] for name, label, unit in _FIGURES
    ]
    train = head["train"]
    best = f"epoch {train['best_epoch']} of {train['epochs_done']}" if train["best_epoch"] else "the head to start from"
    return "\n".join(
        [
            f"{split['train']} places in train, {split['val']} in val, {split['test']} in test; {head['num_cells']} "
            f"cells; {best} is the best on val",
            *_aligned(rows),
            "* chose the epoch on val: `geoloc predict` answers this position",
        ]
    )


_FIGURES = (
    ("top_1", "top-1 cell accuracy", "%"),
    ("top_5", "top-5 cell accuracy", "%"),
    ("median_km", "median error", "km"),
    ("mean_km", "mean error", "km"),
    ("within_1_km", "within 1 km", "%"),
    ("within_25_km", "within 25 km", "%"),
    ("within_200_km", "within 200 km", "%"),
    ("within_750_km", "within 750 km", "%"),
    ("within_2500_km", "within 2500 km", "%"),
    ("balscore", "balscore", ""),
)


def _mark_sweep(out: Path) -> None:
    if read_json(out / SWEEP_MARK, _KIND) is None:
        write_json(out / SWEEP_MARK, mark(_KIND))


def _write_sweep(out: Path, heads: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    if heads:
        write_table(out / SWEEP_TABLE, [_row(name, head) for name, head in heads])


def _train_all(
    job: Job, recipes: Sequence[Recipe], folders: Mapping[str, Path], found: Mapping[str, dict[str, Any] | None]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, head.json) of the heads that are done, the best on val first."""
    heads = []
    for number, recipe in enumerate(recipes, start=1):
        if len(recipes) > 1:
            log.info("head %d of %d: %s", number, len(recipes), recipe.name)
        head = job.train(recipe, folders[recipe.name])
        if head is None:
            # Heads that are done already, of those that would have followed.
            heads += [(later.name, done) for later in recipes[number:] if (done := found[later.name]) is not None]
            break
        heads.append((recipe.name, head))
    return sorted(heads, key=lambda named: -_val_balscore(named[1]))


def _val_balscore(head: Mapping[str, Any]) -> float:
    return float(head["metrics"]["val"][head["position"]]["balscore"])


def _row(name: str, head: Mapping[str, Any]) -> dict[str, Any]:
    """A head in sweep.csv."""
    test, train = head["metrics"]["test"], head["train"]
    values = {
        "name": name,
        "cells": train["cells"],
        "num_cells": head["num_cells"],
        "loss": head["loss"]["kind"],
        "lam": head["loss"].get("lam"),
        "fusion": head["fusion"],
        "seed": train["seed"],
        "best_epoch": train["best_epoch"],
        "position": head["position"],
        "val_balscore": _val_balscore(head),
        "test_top_1": test["top1"]["top_1"],
        "test_top_5": test["top1"]["top_5"],
    }
    for position in ("top1", "mean"):
        for figure in ("median_km", "mean_km", "balscore"):
            values[f"test_{position}_{figure}"] = test[position][figure]
    return values


def _format_sweep(trained: Trained) -> str:
    header = ["head", "val balscore", "position", "test: balscore", "top-1", "top-5", "median", "mean"]
    rows = [header]
    for name, head in trained.heads:
        position = head["position"]
        test = head["metrics"]["test"][position]
        figures = [("balscore", ""), ("top_1", "%"), ("top_5", "%"), ("median_km", "km"), ("mean_km", "km")]
        shown = [_figure(test[figure], unit) for figure, unit in figures]
        rows.append([name, _figure(_val_balscore(head), ""), position, *shown])
    lines = _aligned(rows)
    if len(trained.heads) < trained.num_heads:
        lines.append(f"{trained.num_heads - len(trained.heads)} heads are left; run the same command again")
    return "\n".join(lines)


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.1f} {unit}".strip()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that can be read as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return [lines[0], f"|{rule}|", *lines[1:]]
