"""What a training leaves in its folder: the head twice, its cells, its splits, its epochs as numbers and as a figure.

head.json is written last: it says that all the others are there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.geo.partition import Partition
from geoloc_batch.locate.head_file import save_head
from geoloc_batch.train.checkpoint import CHECKPOINT, HEAD, write_json, write_whole
from geoloc_batch.train.fit import State
from geoloc_batch.train.places import Places
from geoloc_batch.train.split import SPLITS

BEST, SAFETENSORS, CELLS, SPLITS_FILE = "best.pt", "head.safetensors", "geocell_info.json", "splits.parquet"
EPOCHS, FIGURE = "metrics.csv", "metrics.png"
STOOD_FOR = (BEST, SAFETENSORS, CELLS, SPLITS_FILE, EPOCHS, FIGURE)
"""The files that are there where head.json is."""


def write_head(
    folder: Path,
    state: State,
    description: Mapping[str, Any],
    *,
    partition: Partition,
    places: Places,
    cell_L: NDArray[np.int64],
    split_L: NDArray[np.int8],
) -> None:
    """Write all files of a head, each in one move, head.json last; then the checkpoint goes.

    Args:
        folder: of the training.
        state: at its end.
        description: what head.json says; tap, encoder, cells, position and fusion go into the heads' files too.
        partition: the cells.
        places: L of them.
        cell_L: [L] rows of their cells.
        split_L: [L] as `split_places` gives it.
    """
    names = ("tap", "encoder_sha256", "partition_fingerprint", "position", "fusion")
    remarks = {name: description[name] for name in names if description[name]}
    write_whole(folder / CELLS, partition.save)
    write_whole(folder / SPLITS_FILE, lambda part: _write_splits(part, partition, places, cell_L, split_L))
    write_whole(folder / EPOCHS, lambda part: _write_epochs(part, state.history))
    write_whole(folder / FIGURE, lambda part: _draw(part, state))
    for name in (SAFETENSORS, BEST):
        write_whole(folder / name, lambda part: save_head(part, state.best, remarks=remarks))
    write_json(folder / HEAD, description)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of one set of names as CSV, in one move."""
    write_whole(path, lambda part: _write_epochs(part, rows))


def _write_splits(
    path: Path, partition: Partition, places: Places, cell_L: NDArray[np.int64], split_L: NDArray[np.int8]
) -> None:
    named = pa.array([*SPLITS, None])
    table = pa.table(
        {
            "key": places.name_L,
            "lat": places.point_deg_L2[:, 0],
            "lon": places.point_deg_L2[:, 1],
            "cell": pa.array(partition.ids[cell_L], pa.int32()),
            # Code -1, in none of them, is the last.
            "split": named.take(pa.array(split_L.astype(np.int64) % len(named))),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _write_epochs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        # An epoch 0 has figures of val alone.
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def _draw(path: Path, state: State) -> None:
    """Loss, median and balscore by epoch, the chosen epoch marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in state.history]
    labels = {"top1": "best cell's centroid", "mean": "posterior mean"}
    # Its own canvas: no state that a notebook or another thread shares.
    figure = Figure(figsize=(15, 4.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.13, top=0.92, wspace=0.18)
    loss, median, balscore = figure.subplots(1, 3)
    loss.plot(epochs, [row.get("train_loss", math.nan) for row in state.history], color="black")
    loss.set_title("loss in training")
    for axes, name, title in (
        (median, "median_km", "median error on val, km"),
        (balscore, "balscore", "balscore on val"),
    ):
        for position, label in labels.items():
            axes.plot(epochs, [row[f"val_{position}_{name}"] for row in state.history], label=label)
        axes.set_title(title)
        axes.legend()
    for axes in (loss, median, balscore):
        axes.axvline(state.best_epoch, color="grey", linestyle=":")
        axes.set_xlabel("epoch")
    figure.savefig(path, dpi=100)
