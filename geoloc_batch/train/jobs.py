"""The heads of a `geoloc train`, one after the other, each in its folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.locate.head_file import TENSORS
from geoloc_batch.model.arithmetic import auto_precision
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.train.agreement import check_same
from geoloc_batch.train.checkpoint import (
    CHECKPOINT,
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
from geoloc_batch.train.group import Group
from geoloc_batch.train.inputs import Inputs
from geoloc_batch.train.output import STOOD_FOR, write_head
from geoloc_batch.train.recipes import Recipe
from geoloc_batch.train.split import LEFT_OUT, SPLITS

log = logging.getLogger("geoloc_batch")


class Job:
    """Trains the heads of a command.

    Args:
        config: of the command.
        inputs: what `read_inputs` gave.
        group: the ranks that train them together. The first alone reads and writes in their folders.
        stop: is asked between batches.
    """

    def __init__(self, config: TrainConfig, inputs: Inputs, group: Group, stop: StopSignal) -> None:
        self._config, self._inputs, self._group, self._stop = config, inputs, group, stop
        self._features: Features | None = None
        # By their digest, the folder of a head that was trained on them.
        self._known_features: dict[str, Path] = {}

    def agree(self, recipes: Sequence[Recipe]) -> None:
        """Compare what this rank is to train with what the first is; to be called first, nothing is written before.

        Raises:
            UserError: a rank was given, or sees, something else than the first.
        """
        heads = [{"cells": len(recipe.cells.partition), **self._told(recipe)} for recipe in recipes]
        check_same(self._group, heads, is_sweep=self._config.sweep)

    def done(self, recipe: Recipe, folder: Path) -> dict[str, Any] | None:
        """The head.json of a head that is done; None where it is not, or files of it are gone.

        Raises:
            OutputError: the folder is pinned to other settings.
        """
        found = self._group.from_first(lambda: self._found(recipe, folder))
        if found is not None:
            self._known_features[found["train"]["features_sha256"]] = folder
        return found

    def train(self, recipe: Recipe, folder: Path) -> dict[str, Any] | None:
        """Train a head and write it; its head.json, or None where training was stopped.

        Raises:
            OutputError: the folder is pinned to other settings or features, or is in use.
            InputError: the features cannot be read, or a split has none.
            GeolocError: training ran away, or the disk is full.
        """
        group = self._group
        with group.first_within(locked(folder)):
            settings, found = group.from_first(lambda: self._begin(recipe, folder))
            if found is not None:
                return found
            task = self._task(recipe, folder)
            state = group.from_first(lambda: self._state(task, folder))
            self._check_features(task.features, {state.features_sha256: folder})
            ended = fit(
                task,
                self._config.fit,
                recipe.loss,
                state,
                seed=recipe.seed,
                precision=str(settings["precision"]),
                is_first_judged=self._inputs.warm is not None,
                after_epoch=lambda state: group.from_first(lambda: self._after_epoch(folder, state)),
                is_stopped=self._stop.is_set,
                group=group,
            )
            if ended is None:
                return None
            metrics = {split: evaluate(task, ended.best, split, group).by_name() for split in ("val", "test")}
            return group.from_first(lambda: self._finish(recipe, folder, settings, task, ended, metrics))

    def _found(self, recipe: Recipe, folder: Path) -> dict[str, Any] | None:
        check_settings(folder, self._settings(recipe, folder))
        found = read_json(folder / HEAD)
        return None if found is None or _missing(folder) else found

    def _begin(self, recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The settings, to which the folder is pinned from now on, and the head.json of a head that is done."""
        settings = self._settings(recipe, folder)
        pin(folder, settings)
        found, missing = read_json(folder / HEAD), _missing(folder)
        if found is not None and not missing:
            # A process that was killed between the last two steps of its end left the checkpoint.
            (folder / CHECKPOINT).unlink(missing_ok=True)
            return settings, found
        if found is not None:
            log.warning("%s is done, but lacks %s: the head is trained again", folder, ", ".join(missing))
            (folder / HEAD).unlink()
        return settings, None

    def _state(self, task: Task, folder: Path) -> State:
        """That of the checkpoint, or a new one."""
        state = load_checkpoint(folder)
        if state is None:
            return State(head=self._first_head(task), features_sha256=task.features.sha256)
        if state.epoch:
            log.info("going on after epoch %d of %d", state.epoch, self._config.fit.epochs)
        return state

    def _settings(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """Everything that decides what the head is; what is left open may be pinned in the folder: the first rank's."""
        settings = self._told(recipe)
        if settings["precision"] == "auto":
            pinned = read_json(folder / SETTINGS) or {}
            settings["precision"] = pinned.get("precision", auto_precision(self._group.device))
        return settings

    def _told(self, recipe: Recipe) -> dict[str, Any]:
        """The settings as the command and its inputs tell them, the precision perhaps still open."""
        fit_settings = asdict(self._config.fit)
        del fit_settings["hold"]
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
            self._features = load_features(
                self._inputs.places, kind, self._group.device, hold=hold, scratch=folder, group=self._group
            )
            where = "in a scratch file" if self._features.is_mapped else f"in the memory of {self._group.device}"
            log.info("%d places, features %s", len(self._inputs.places), where)
            if self._features.left_out:
                log.warning("left out: %s", _listed(self._features.left_out))
            self._check_features(self._features, self._known_features)
            self._known_features[self._features.sha256] = folder
        return self._features

    def _check_features(self, features: Features, folders: Mapping[str, Path]) -> None:
        for digest, folder in folders.items():
            if digest != features.sha256:
                raise OutputError(
                    f"the embeddings in {', '.join(self._config.embeddings)} have changed since training in {folder} "
                    "began: same photos, other features; bring the embeddings back as they were, or give another --out"
                )

    def _first_head(self, task: Task) -> dict[str, torch.Tensor]:
        warm = self._inputs.warm
        if warm is not None:
            return dict(zip(TENSORS, (warm.norm_weight, warm.norm_bias, warm.weight, warm.bias), strict=True))
        return first_head(task, is_standard=self._config.fit.norm_start == "standard")

    def _after_epoch(self, folder: Path, state: State) -> None:
        save_checkpoint(folder, state)
        row = state.history[-1]
        log.info(
            "epoch %d/%d: %sval top-1 %.1f %%, centroid %.1f km balscore %.1f, mean %.1f km balscore %.1f%s",
            state.epoch,
            self._config.fit.epochs,
            f"loss {row['train_loss']:.4g}, " if "train_loss" in row else "",
            row["val_top_1"],
            row["val_top1_median_km"],
            row["val_top1_balscore"],
            row["val_mean_median_km"],
            row["val_mean_balscore"],
            ", the best so far" if state.best_epoch == state.epoch else "",
        )

    def _finish(
        self,
        recipe: Recipe,
        folder: Path,
        settings: dict[str, Any],
        task: Task,
        state: State,
        metrics: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        inputs = self._inputs
        origin = inputs.places.origin
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
            "split": {**inputs.split, **_counts(task)},
            "metrics": metrics,
            "train": {
                **settings,
                "cells": recipe.cells.partition.source,
                "group_by": self._config.group_by or None,
                "features_sha256": state.features_sha256,
                "left_out": {**inputs.places.left_out, **task.features.left_out},
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
            split_L=task.used_L,
        )
        return description


def _missing(folder: Path) -> list[str]:
    """What is gone of the files that a head.json stands for."""
    return [name for name in STOOD_FOR if not (folder / name).is_file()]


def _counts(task: Task) -> dict[str, int]:
    """The places that each split trained or scored, and those in none."""
    counts = {name: len(task.places_of(name)) for name in SPLITS}
    return {**counts, "left_out": int((task.used_L == LEFT_OUT).sum())}


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())
