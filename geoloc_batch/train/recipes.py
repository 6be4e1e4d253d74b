"""Recipes: which heads a command asks for. One, or with --sweep every combination of what was repeated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.errors import ConfigError, PartitionError
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.train.config import (
    DEFAULT_FUSION,
    DEFAULT_LAM,
    DEFAULT_LOSS,
    DEFAULT_SEED,
    Fusion,
    LossConfig,
    TrainConfig,
)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Cells:
    """A partition that heads are trained on."""

    name: str
    """For folders and tables: the file's name, or its folder's where every file is called geocell_info.json."""
    partition: Partition


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Recipe:
    """What tells one head of a command from the others."""

    cells: Cells
    fusion: Fusion
    loss: LossConfig
    seed: int

    @property
    def name(self) -> str:
        """The folder of its head in a sweep: h3_res4_weighted-ce-haversine-lam0.05_feature_seed0."""
        return f"{self.cells.name}_{self.loss.name}_{self.fusion}_seed{self.seed}"


def load_cells(paths: Sequence[str]) -> list[Cells]:
    """The partitions that --cells names.

    Raises:
        PartitionError: a file is wrong, its ids cannot index a head's rows, it has a single cell, or two files hold
            the same cells.
    """
    found: list[Cells] = []
    by_fingerprint: dict[str, str] = {}
    for path in paths:
        partition = load_partition(path)
        num_cells = len(partition)
        if partition.ids[-1] != num_cells - 1:
            raise PartitionError(
                f"{path}: ids must be 0 to {num_cells - 1} to index the rows of a head, found the id "
                f"{partition.ids[-1]}; renumber the cells"
            )
        if num_cells < 2:
            raise PartitionError(f"{path} holds one cell: there is nothing to choose; give cells of more (--cells)")
        if partition.fingerprint in by_fingerprint:
            raise PartitionError(
                f"{path} and {by_fingerprint[partition.fingerprint]} hold the same cells; give one of them"
            )
        by_fingerprint[partition.fingerprint] = path
        found.append(Cells(name=_free_name(path, [cells.name for cells in found]), partition=partition))
    return found


def recipes_of(config: TrainConfig, all_cells: Sequence[Cells]) -> list[Recipe]:
    """All combinations; those that store the same features follow one another.

    Raises:
        ConfigError: two of them have one name, and with it one folder.
    """
    recipes = [
        Recipe(cells=cells, fusion=fusion, loss=loss, seed=seed)
        for fusion, cells, loss, seed in itertools.product(
            config.fusion or (DEFAULT_FUSION,), all_cells, _losses(config), config.seed or (DEFAULT_SEED,)
        )
    ]
    names = [recipe.name for recipe in recipes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two heads of this sweep would be trained in one folder, {twice}; leave one of them out")
    return recipes


def _losses(config: TrainConfig) -> Iterator[LossConfig]:
    flags = config.loss_flags
    for kind in config.loss or (DEFAULT_LOSS,):
        # lam tells nothing apart where the distance has no part.
        for lam in (config.lam or (DEFAULT_LAM,)) if "haversine" in kind else (0.0,):
            yield LossConfig(
                kind=kind,
                lam=lam,
                smoothing=flags.label_smoothing,
                tau_km=flags.tau_km,
                is_normalised=flags.normalise_targets,
            )


def _free_name(path: str, taken: Sequence[str]) -> str:
    file = Path(path).absolute()
    stem = file.parent.name if file.name == "geocell_info.json" else file.stem
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", stem).strip(".-") or "cells"
    names = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
    return next(name for name in names if name not in taken)
