"""The demo: photos of a synthetic Europe -> pack -> embed -> cells -> train -> predict -> evaluate, by the commands.

Shape letters: N test places.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.demo.figure import draw_figure
from geoloc_batch.demo.photos import HEADINGS, make_photos
from geoloc_batch.demo.world import make_places
from geoloc_batch.errors import ConfigError, OutputError
from geoloc_batch.evaluate.comparison import evaluate
from geoloc_batch.evaluate.config import EvaluateConfig
from geoloc_batch.flags import from_flat
from geoloc_batch.geo.cells.commands import build
from geoloc_batch.geo.cells.config import H3Config
from geoloc_batch.geo.partition import load_partition
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.run.config import EmbedConfig, PredictConfig
from geoloc_batch.run.jobs import embed, predict
from geoloc_batch.run.positions import read_positions
from geoloc_batch.stream.pack import pack_with
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.train.commands import train
from geoloc_batch.train.config import TrainConfig

NUM_SHARDS = 8
MIN_PLACES = 50
# For a few thousand places and an encoder that has learned nothing.
TRAINING = {"loss": "ce", "batch_size": 256, "lr": 0.01, "weight_decay": 0.05, "epochs": 40}
_MARK = "demo.json"
_MADE = ("photos", "photos.csv", "shards", "emb", "cells.json", "head", "pred", "scores", "figure.png", _MARK)

_COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "pack": (PackConfig, pack_with),
    "embed": (EmbedConfig, embed),
    "cells build h3": (H3Config, lambda config: build(config, read_positions)),
    "train": (TrainConfig, train),
    "predict": (PredictConfig, predict),
    "evaluate": (EvaluateConfig, evaluate),
}


@dataclass(slots=True)
class _Steps:
    """The commands, each said before it runs, and the seconds that they took."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, command: str, positional: tuple[str, str] | None = None, /, **flags: Any) -> Any:
        """Run one command as the command line would; `positional` is what stands without its name, with its name."""
        kind, function = _COMMANDS[command]
        words = [command, *positional[1:]] if positional else [command]
        words += [f"--{name.replace('_', '-')} {value}" for name, value in flags.items()]
        self.say(f"geoloc {' '.join(words)}")
        given: Mapping[str, Any] = {**({positional[0]: positional[1]} if positional else {}), **flags}
        return self.timed(command.split()[0], lambda: function(from_flat(kind, given)))

    def timed(self, name: str, function: Callable[[], Any]) -> Any:
        """Call it and note its time."""
        start = time.monotonic()
        result = function()
        self.seconds[name] = round(time.monotonic() - start, 1)
        return result


def run_demo(
    out: str | Path, *, num_places: int = 3200, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run every step of the pipeline on photos that are drawn for it.

    Args:
        out: folder for all that is made; what an earlier demo made there is replaced.
        num_places: each is photographed towards four headings.
        seed: of places, photos, split and head.
        say: gets a line for each step and the table at the end.

    Returns:
        images, images_per_second (of embedding), top1 (share of test places in their cell), median_km of test places,
        guess_km (median of naming the commonest cell), better (guess_km / median_km), cells, test_places, seconds by
        step, out.

    Raises:
        ConfigError: num_places is too small.
        OutputError: `out` holds something that no demo made.
    """
    if num_places < MIN_PLACES:
        raise ConfigError(f"--places must be at least {MIN_PLACES}, got {num_places}")
    folder = _cleared(Path(out))
    start = time.monotonic()
    steps = _Steps(say)
    say(f"drawing {num_places} places x {len(HEADINGS)} headings")
    table, _ = steps.timed("draw", lambda: make_photos(folder, make_places(num_places, seed), seed=seed))
    shards, emb, cells, head, pred, scores = (
        str(folder / name) for name in ("shards", "emb", "cells.json", "head", "pred", "scores")
    )
    shard_photos = -(-num_places * len(HEADINGS) // NUM_SHARDS)
    steps.run("pack", ("sources", str(table)), out=shards, shard_photos=shard_photos)
    embedded = steps.run("embed", ("shards", shards), out=emb, encoder="demo")
    steps.run("cells build h3", ("points", emb), out=cells, res=2)
    places = {"group_by": "location"}
    steps.run("train", ("embeddings", emb), cells=cells, out=head, **places, **TRAINING, split_seed=seed, seed=seed)
    steps.run("predict", from_embeddings=emb, out=pred, head=f"{head}/best.pt", **places)
    scored = steps.run("evaluate", ("predictions", pred), truth=f"{head}/splits.parquet", split="test", out=scores)
    guess_km = _draw(folder)
    metrics = scored.metrics
    result = {
        "images": embedded.rows,
        "images_per_second": embedded.images_per_second,
        "top1": round(metrics.top_1 / 100, 4),
        "median_km": round(metrics.median_km, 1),
        "guess_km": round(guess_km, 1),
        "better": round(guess_km / metrics.median_km, 2),
        "cells": len(load_partition(cells)),
        "test_places": metrics.rows,
        "seconds": {**steps.seconds, "all": round(time.monotonic() - start, 1)},
        "out": str(out),
    }
    (folder / _MARK).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(_table(result))
    return result


def _cleared(folder: Path) -> Path:
    """The folder, emptied of what an earlier demo made."""
    if folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in _MADE)
        if foreign or (any(folder.iterdir()) and not (folder / _MARK).exists()):
            name = foreign[0] if foreign else next(folder.iterdir()).name
            raise OutputError(f"--out {folder} holds {name!r}, which no demo made; give a new or an empty folder")
        for name in _MADE[:-1]:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif folder.exists():
        raise OutputError(f"--out {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    # The mark comes first: a demo that is cut off may be cleared by the next.
    (folder / _MARK).write_text("{}\n", encoding="utf-8")
    return folder


def _draw(folder: Path) -> float:
    """The figure of the test places. Gives the median error, in km, of naming the commonest cell for each."""
    rows = pq.read_table(folder / "scores" / "rows.parquet")
    true_deg_N2, found_deg_N2 = (
        np.stack([rows[lat].to_numpy(), rows[lon].to_numpy()], axis=1)
        for lat, lon in (("true_lat", "true_lon"), ("lat", "lon"))
    )
    guess_km_N = haversine_km(true_deg_N2, _commonest_cell(folder))
    draw_figure(folder / "figure.png", true_deg_N2, found_deg_N2, rows["distance_km"].to_numpy(), guess_km_N)
    return float(np.median(guess_km_N))


def _commonest_cell(folder: Path) -> NDArray[np.float64]:
    """[2] the centroid of the cell with most training places."""
    splits = pq.read_table(folder / "head" / "splits.parquet", filters=[("split", "=", "train")])
    cells, counts = np.unique(splits["cell"].to_numpy(), return_counts=True)
    partition = load_partition(folder / "head" / "geocell_info.json")
    centroid: NDArray[np.float64] = partition.centroids_of(cells[[counts.argmax()]].astype(np.int64))[0]
    return centroid


def _table(result: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    return "\n".join(
        [
            f"{result['images']} photos embedded, {result['images_per_second']:.0f} a second; {seconds}",
            f"{result['test_places']} places that the head has never seen, {len(HEADINGS)} photos of each, "
            f"{result['cells']} cells:",
            f"  in the right cell          {result['top1']:8.1%}",
            f"  median error               {result['median_km']:8.0f} km",
            f"  of the commonest cell      {result['guess_km']:8.0f} km   ({result['better']:.1f} times as far)",
            f"figure: {result['out']}/figure.png",
        ]
    )
