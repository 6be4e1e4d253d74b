"""The thirteen published European heads by short names, as their model card states them. Free of torch.

The table says where a head is and what it is said to reach. Sizes are never taken from it: they come from the files.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADS_REPO = "lebfla11/streetview-eu-geocell-heads"
HEADS_LICENCE = "MIT"

# The card names geocells_h3_res4_eu, and for the others a pattern: geocells_ and the partition's name. That name is
# taken to be the one in the head's own path, sweep_v5/streetclip/NAME, which holds for the one that can be compared.
_CELLS = "data_collection/outputs/geocells_{}/geocell_info.json"
_H3 = "h3_res4_eu"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedHead:
    """One row of the card's table."""

    name: str
    """What it is called on the command line."""
    path: str
    """Of its best.pt, in the repository."""
    partition: str
    """The partition as the card calls it."""
    cells_path: str
    """Of the partition's geocell_info.json, in the repository."""
    num_cells: int
    """As the card says."""
    top_1_percent: float
    """Share of the test photos whose best cell is the right one."""
    balscore: float
    """Cube root of the product of the percentages within 25, 200 and 750 km."""

    @property
    def file(self) -> str:
        """Where the head is, as --head takes it."""
        return f"hf:{HEADS_REPO}/{self.path}"

    @property
    def cells(self) -> str:
        """Where its cells are, as --cells takes it."""
        return f"hf:{HEADS_REPO}/{self.cells_path}"


def _head(
    name: str, folder: str, partition: str, num_cells: int, top_1_percent: float, balscore: float, *, cells: str = ""
) -> PublishedHead:
    return PublishedHead(
        name=name,
        path=f"{folder}/best.pt",
        partition=partition,
        cells_path=_CELLS.format(cells or folder.rpartition("/")[2]),
        num_cells=num_cells,
        top_1_percent=top_1_percent,
        balscore=balscore,
    )


_SWEEP = "sweep_v5/streetclip"

PUBLISHED_HEADS = (
    _head("eu-h3r4-v13", "ablation_v13_weighted/lam_0.05", "H3 res=4 EU", 1898, 29.7, 63.1, cells=_H3),
    _head("eu-h3r4-v13-lam0.01", "ablation_v13_weighted/lam_0.01", "H3 res=4 EU", 1898, 29.3, 62.8, cells=_H3),
    _head("eu-h3r4-v12", "ablation_v12/seed_44", "H3 res=4 EU", 1898, 28.8, 62.1, cells=_H3),
    _head("eu-h3r4", f"{_SWEEP}/h3_res4_eu", "H3 res=4 EU", 1898, 28.3, 61.5),
    _head("eu-kmeans2000", f"{_SWEEP}/k2000_eu", "K-Means k=2000 EU", 1792, 27.5, 60.0),
    _head("eu-kmeans4000", f"{_SWEEP}/k4000_eu", "K-Means k=4000 EU", 3180, 22.9, 60.0),
    _head("eu-kdtree19", f"{_SWEEP}/kdtree19_eu", "K-d tree t=19 EU", 5444, 15.7, 58.6),
    _head("eu-kdtree39", f"{_SWEEP}/kdtree39_eu", "K-d tree t=39 EU", 2059, 21.8, 58.4),
    _head("eu-kmeans1000", f"{_SWEEP}/k1000_eu", "K-Means k=1000 EU", 957, 36.2, 57.9),
    _head("eu-nuts3", f"{_SWEEP}/nuts3_eu", "NUTS-3 EU", 1194, 37.6, 56.8),
    _head("eu-kdtree78", f"{_SWEEP}/kdtree78_eu", "K-d tree t=78 EU", 1029, 27.5, 55.3),
    _head("eu-kmeans500", f"{_SWEEP}/k500_eu", "K-Means k=500 EU", 487, 43.4, 51.7),
    _head("eu-kdtree155", f"{_SWEEP}/kdtree155_eu", "K-d tree t=155 EU", 515, 36.1, 50.7),
)
"""In the order of the card: the best first."""

DEFAULT_HEAD = PUBLISHED_HEADS[0]
"""The card's headline: 10 epochs of weighted cross-entropy + 0.05 x haversine, started from eu-h3r4-v12."""

_BY_NAME = {head.name: head for head in PUBLISHED_HEADS}
_BY_FILE = {head.file: head for head in PUBLISHED_HEADS}


def published(text: str) -> PublishedHead | None:
    """The head that a short name, or its whole hf: path, stands for."""
    return _BY_NAME.get(text) or _BY_FILE.get(text)


def near_names(text: str) -> list[str]:
    """Short names that `text` may have been meant to be, the nearest first."""
    exact = [name for name in (text.lower(), f"eu-{text.lower()}") if name in _BY_NAME]
    return exact or difflib.get_close_matches(text.lower(), _BY_NAME, n=3, cutoff=0.7)


def list_heads(cached: Callable[[str, str], Path | None]) -> dict[str, Any]:
    """What `geoloc heads` ends with.

    Args:
        cached: a file's path in the local cache of the hub, None where it is not there: hub.cached.

    Returns:
        repository, licence, default, and the heads: "cached" tells whether head and cells are both at hand.
    """
    heads = [
        {
            "name": head.name,
            "partition": head.partition,
            "num_cells": head.num_cells,
            "top_1_percent": head.top_1_percent,
            "balscore": head.balscore,
            "path": head.path,
            "cells_path": head.cells_path,
            "cached": all(cached(HEADS_REPO, path) is not None for path in (head.path, head.cells_path)),
        }
        for head in PUBLISHED_HEADS
    ]
    return {"repository": HEADS_REPO, "licence": HEADS_LICENCE, "default": DEFAULT_HEAD.name, "heads": heads}


def format_heads(listing: dict[str, Any]) -> str:
    """A listing as lines for a terminal."""
    heads = listing["heads"]
    width, partition_width, path_width = (
        max(len(head[key]) for head in heads) for key in ("name", "partition", "path")
    )
    lines = [
        f"{'head':<{width}}    {'partition':<{partition_width}}  {'cells':>5}  {'top-1':>6}  balscore  "
        f"{'path':<{path_width}}  cached"
    ]
    lines += [
        f"{head['name']:<{width}}  {'*' if head['name'] == listing['default'] else ' '} "
        f"{head['partition']:<{partition_width}}  {head['num_cells']:>5}  {head['top_1_percent']:>4} %  "
        f"{head['balscore']:>8}  {head['path']:<{path_width}}  {'yes' if head['cached'] else '-'}"
        for head in heads
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"* is the default. All are in {listing['repository']} (licence {listing['licence']}), for the pooled "
            "features of StreetCLIP.",
            "Cells, top-1 and balscore are what its card states. A head and its cells are downloaded when --head names "
            "it.",
        ]
    )
