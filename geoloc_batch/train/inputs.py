"""What all heads of a `geoloc train` share and is read once: places, their cells, their split, the head to start from.

Shape letters: L places.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import HeadError
from geoloc_batch.locate.head_file import Head, read_head
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.places import Places, read_places
from geoloc_batch.train.recipes import Cells
from geoloc_batch.train.split import check_leaks, kept_buffer_km, split_places
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
    """How it was made, for head.json: the rule and its outcome's sha256."""
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
    # What is kept, not what was given: half of the block where no buffer was.
    buffer_km = None if flags.block_km is None else kept_buffer_km(flags.block_km, flags.buffer_km)
    rule: dict[str, Any] = {"block_km": flags.block_km, "buffer_km": buffer_km}
    if flags.split_file:
        split_L = read_split_file(flags.split_file, places.name_L)
        rule |= {"rule": "file", "file": flags.split_file}
    else:
        split_S = split_places(
            places.spot_deg_S2,
            cell_L[places.place_S],
            together_N=places.place_S,
            shares=flags.shares,
            block_km=flags.block_km,
            buffer_km=flags.buffer_km,
            seed=flags.split_seed,
        )
        # The first spots are the places' own.
        split_L = split_S[: len(places)]
        rule |= {"rule": "by cell" if flags.block_km is None else "by block", "shares": list(flags.shares)}
        rule |= {"seed": flags.split_seed, "cells": finest.partition.fingerprint if flags.block_km is None else None}
    check_leaks(
        places.spot_deg_S2,
        split_L[places.place_S],
        block_km=flags.block_km,
        buffer_km=flags.buffer_km,
        source=f"--split-file {flags.split_file}" if flags.split_file else "the split",
        name_of=lambda spot: repr(places.name_L[int(places.place_S[spot])].as_py()),
    )
    return split_L, {**rule, "sha256": hashlib.sha256(split_L.tobytes()).hexdigest()}


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
