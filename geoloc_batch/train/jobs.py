"""`geoloc train`: what is read once for all heads of a command, and one head after the other.

Shape letters: L places, C cells.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoloc_batch.errors import HeadError, InputError
from geoloc_batch.locate.head_file import TENSORS, Head, read_head
from geoloc_batch.model.arithmetic import auto_precision
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.train.checkpoint import (
    HEAD,
    KIND,
    SETTINGS,
    check_settings,
    load_checkpoint,
    locked,
    mark,
    pin,
    read_json,
    save_checkpoint,
)
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.features import Features, Kind, kind_of, load_features
from geoloc_batch.train.fit import State, Task, evaluate, first_head, fit
from geoloc_batch.train.output import write_head
from geoloc_batch.train.places import Places, read_places
from geoloc_batch.train.recipes import Cells, Recipe
from geoloc_batch.train.split import SPLITS, check_leaks, split_places
from geoloc_batch.train.split_file import read_split_file

log = logging.getLogger("geoloc_batch")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Inputs:
    """What all heads of a command share."""

    places: Places
    cell_L: dict[str, NDArray[np.int64]]
    """[L] rows of the places' cells, by the cells' name."""
    split_L: NDArray[np.int8]
    """[L] as `split_places` gives it."""
    split: dict[str, Any]
    """How it was made, for head.json."""
    warm: Head | None
    """What --warm-start names."""


def read_inputs(config: TrainConfig, all_cells: list[Cells]) -> Inputs:
    """Read everything but the features.

    Raises:
        UserError: the embeddings, the truth, the split or the head to start from cannot be used.
    """
    warm = read_head(config.fit.warm_start) if config.fit.warm_start else None
    if warm is not None:
        for cells in all_cells:
            _check_warm(warm, cells)
    places = read_places(config)
    if places.left_out:
        log.warning("left out: %s", ", ".join(f"{count} {reason}" for reason, count in places.left_out.items()))
    if warm is not None:
        _check_warm_features(warm, places)
    cell_L = {}
    for cells in all_cells:
        assigned = cells.partition.locate(*places.point_deg_L2.T)
        cell_L[cells.name] = assigned.ids
        if assigned.complaint(cells.partition):
            log.warning("%s", assigned.complaint(cells.partition))
    # One split for all heads, or their figures could not be compared.
    finest = max(all_cells, key=lambda cells: len(cells.partition))
    split_L, split = _split(config, places, finest, cell_L[finest.name])
    return Inputs(places=places, cell_L=cell_L, split_L=split_L, split=split, warm=warm)


def _split(
    config: TrainConfig, places: Places, finest: Cells, cell_L: NDArray[np.int64]
) -> tuple[NDArray[np.int8], dict[str, Any]]:
    flags = config.split
    rule: dict[str, Any] = {"block_km": flags.block_km, "buffer_km": flags.buffer_km}
    if flags.split_file:
        split_L = read_split_file(flags.split_file, places.name_L)
        rule |= {"rule": "file", "file": flags.split_file}
    else:
        split_L = split_places(
            places.point_deg_L2,
            cell_L,
            shares=flags.shares,
            block_km=flags.block_km,
            buffer_km=flags.buffer_km,
            seed=flags.split_seed,
        )
        rule |= {"rule": "by cell" if flags.block_km is None else "by block", "shares": list(flags.shares)}
        rule |= {"seed": flags.split_seed, "cells": finest.partition.fingerprint if flags.block_km is None else None}
    source = f"--split-file {flags.split_file}" if flags.split_file else "the split"
    check_leaks(places.point_deg_L2, split_L, block_km=flags.block_km, buffer_km=flags.buffer_km, source=source)
    counts = {name: int((split_L == code).sum()) for code, name in enumerate(SPLITS)}
    digest = hashlib.sha256(split_L.tobytes()).hexdigest()
    return split_L, {**rule, **counts, "left_out": int((split_L < 0).sum()), "sha256": digest}


def _check_warm(warm: Head, cells: Cells) -> None:
    partition = cells.partition
    if warm.num_cells != len(partition) or warm.partition_fingerprint not in (None, partition.fingerprint):
        other = "others" if warm.num_cells == len(partition) else str(len(partition))
        raise HeadError(
            f"--warm-start {warm.path} chooses among {warm.num_cells} cells, {partition.source} has {other}; give the "
            "cells that the head was trained on (--cells), or leave --warm-start out"
        )


def _check_warm_features(warm: Head, places: Places) -> None:
    origin = places.origin
    if (warm.dim, warm.tap) != (origin.dim, origin.tap):
        raise HeadError(
            f"--warm-start {warm.path} takes {warm.dim} {warm.tap} features, the embeddings are {origin.dim} "
            f"{origin.tap} ones; give a head of the same encoder, or leave --warm-start out"
        )
    if warm.encoder_sha256 not in (None, origin.encoder_sha256) and origin.encoder_sha256 is not None:
        raise HeadError(
            f"--warm-start {warm.path} was trained on the encoder with sha256 {str(warm.encoder_sha256)[:12]}, the "
            f"embeddings are of {origin.encoder_sha256[:12]}; give a head of the same encoder, or leave it out"
        )


class Job:
    """Trains the heads of a command.

    Args:
        config: of the command.
        inputs: what `read_inputs` gave.
        device: where training is.
        stop: is asked between batches.
    """

    def __init__(self, config: TrainConfig, inputs: Inputs, device: torch.device, stop: StopSignal) -> None:
        self._config, self._inputs, self._device, self._stop = config, inputs, device, stop
        self._features: Features | None = None

    def done(self, recipe: Recipe, folder: Path) -> dict[str, Any] | None:
        """The head.json of a head that is done; None where it is not.

        Raises:
            OutputError: the folder is pinned to other settings.
        """
        check_settings(folder, self._settings(recipe, folder))
        return read_json(folder / HEAD)

    def train(self, recipe: Recipe, folder: Path) -> dict[str, Any] | None:
        """Train a head and write it; its head.json, or None where training was stopped."""
        with locked(folder):
            settings = self._settings(recipe, folder)
            pin(folder, settings)
            found = read_json(folder / HEAD)
            if found is not None:
                # A process that was killed between the last two steps of its end left the checkpoint.
                (folder / "_checkpoint.pt").unlink(missing_ok=True)
                return found
            task = self._task(recipe, folder)
            state = load_checkpoint(folder) or State(head=self._first_head(task))
            if state.epoch:
                log.info("going on after epoch %d of %d", state.epoch, self._config.fit.epochs)
            ended = fit(
                task,
                self._config.fit,
                recipe.loss,
                state,
                seed=recipe.seed,
                precision=str(settings["precision"]),
                after_epoch=lambda state: self._after_epoch(folder, state),
                is_stopped=self._stop.is_set,
            )
            return None if ended is None else self._finish(recipe, folder, settings, task, ended)

    def _settings(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """Everything that decides what the head is."""
        fit_settings = asdict(self._config.fit)
        del fit_settings["hold"]
        if fit_settings["precision"] == "auto":
            pinned = read_json(folder / SETTINGS) or {}
            fit_settings["precision"] = pinned.get("precision", auto_precision(self._device))
        warm = self._inputs.warm
        fit_settings["warm_start"] = None if warm is None else warm.sha256
        places, origin = self._inputs.places, self._inputs.places.origin
        return {
            "loss": recipe.loss.settings,
            "fusion": recipe.fusion,
            "seed": recipe.seed,
            **fit_settings,
            "partition_fingerprint": recipe.cells.partition.fingerprint,
            "encoder_sha256": origin.encoder_sha256,
            "tap": origin.tap,
            "dim": origin.dim,
            "places": len(places),
            "places_sha256": places.digest,
            "split_sha256": self._inputs.split["sha256"],
        }

    def _task(self, recipe: Recipe, folder: Path) -> Task:
        features = self._features_of(kind_of(recipe.fusion, self._config.fit.view_dropout), folder)
        task = Task(
            features=features,
            point_deg_L2=self._inputs.places.point_deg_L2,
            cell_L=self._inputs.cell_L[recipe.cells.name],
            split_L=self._inputs.split_L,
            partition=recipe.cells.partition,
        )
        for split in SPLITS:
            if not len(task.places_of(split)):
                raise InputError(f"no place of the split {split} has features without NaN; embed the photos again")
        return task

    def _features_of(self, kind: Kind, folder: Path) -> Features:
        """Kept until another kind is asked for."""
        if self._features is None or self._features.kind != kind:
            self._features = None
            hold = self._config.fit.hold
            self._features = load_features(self._inputs.places, kind, self._device, hold=hold, scratch=folder)
            where = "in a scratch file" if self._features.is_mapped else f"in the memory of {self._device}"
            log.info("%d places, features %s", len(self._inputs.places), where)
            if self._features.num_bad_rows:
                log.warning("left out: %d rows whose features hold NaN or infinities", self._features.num_bad_rows)
        return self._features

    def _first_head(self, task: Task) -> dict[str, torch.Tensor]:
        warm = self._inputs.warm
        if warm is not None:
            return dict(zip(TENSORS, (warm.norm_weight, warm.norm_bias, warm.weight, warm.bias), strict=True))
        return first_head(task, is_standard=self._config.fit.norm_start == "standard")

    def _after_epoch(self, folder: Path, state: State) -> None:
        save_checkpoint(folder, state)
        row = state.history[-1]
        log.info(
            "epoch %d/%d: loss %.4g, val top-1 %.1f %%, centroid %.1f km balscore %.1f, mean %.1f km balscore %.1f%s",
            state.epoch,
            self._config.fit.epochs,
            row["train_loss"],
            row["val_top_1"],
            row["val_top1_median_km"],
            row["val_top1_balscore"],
            row["val_mean_median_km"],
            row["val_mean_balscore"],
            ", the best so far" if state.best_epoch == state.epoch else "",
        )

    def _finish(
        self, recipe: Recipe, folder: Path, settings: dict[str, Any], task: Task, state: State
    ) -> dict[str, Any]:
        inputs = self._inputs
        origin = inputs.places.origin
        metrics = {split: evaluate(task, state.best, split).by_name() for split in ("val", "test")}
        description = {
            **mark(KIND),
            "tap": origin.tap,
            "encoder_sha256": origin.encoder_sha256,
            "encoder": inputs.places.encoder,
            "partition_fingerprint": recipe.cells.partition.fingerprint,
            "position": state.position,
            "fusion": recipe.fusion,
            "dim": origin.dim,
            "num_cells": len(recipe.cells.partition),
            "loss": recipe.loss.settings,
            "split": inputs.split,
            "metrics": metrics,
            "train": {
                **settings,
                "cells": recipe.cells.partition.source,
                "group_by": self._config.group_by or None,
                "left_out": inputs.places.left_out,
                "epochs_done": state.epoch,
                "best_epoch": state.best_epoch,
                "seconds": round(sum(row["seconds"] for row in state.history), 3),
            },
        }
        write_head(
            folder,
            state,
            description,
            partition=recipe.cells.partition,
            places=inputs.places,
            cell_L=task.cell_L,
            split_L=task.split_L,
        )
        return description
