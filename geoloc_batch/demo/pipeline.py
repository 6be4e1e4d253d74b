"""The demo: photos of a synthetic Europe -> pack -> embed -> cells and a head -> predict -> how good that is.

Shape letters: N photos, P places, D features.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.demo.figure import draw_figure
from geoloc_batch.demo.photos import HEADINGS, make_photos
from geoloc_batch.demo.training import train_head
from geoloc_batch.demo.world import make_places
from geoloc_batch.errors import ConfigError, OutputError
from geoloc_batch.flags import from_flat
from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.locate.head import load_head
from geoloc_batch.locate.head_file import save_head
from geoloc_batch.run.config import EmbedConfig, PredictConfig
from geoloc_batch.run.jobs import embed, predict
from geoloc_batch.store.features import plan_embeddings, read_features
from geoloc_batch.store.pin import read_config
from geoloc_batch.stream.pack import pack

Floats = NDArray[np.float64]

RESOLUTION = 2
NUM_SHARDS = 8
TEST_SHARE = 0.2
MIN_PLACES = 50
_MARK = "demo.json"
_MADE = ("photos", "photos.csv", "shards", "emb", "head", "pred", "figure.png", _MARK)


@dataclass(slots=True)
class _Clock:
    """Seconds of each step, and what is said meanwhile."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, words: str) -> Iterator[None]:
        self.say(words)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


@dataclass(frozen=True, slots=True)
class _Embedded:
    """The embeddings of all photos, with where they are from."""

    feature_ND: NDArray[np.float32]
    place_N: NDArray[np.int64]
    point_deg_N2: Floats


def run_demo(
    out: str | Path, *, num_places: int = 3200, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run every step of the pipeline on photos that are drawn for it.

    Args:
        out: folder for all that is made; what an earlier demo made there is replaced.
        num_places: P; each is photographed towards four headings.
        seed: of places, photos and head.
        say: gets a line for each step and the table at the end.

    Returns:
        images, images_per_second (of embedding), top1 (share of test places in their cell), median_km of test places,
        photo_median_km (the same photo by photo), guess_km (median of naming the commonest cell), better
        (guess_km / median_km), seconds by step, out.

    Raises:
        ConfigError: num_places is too small.
        OutputError: `out` holds something that no demo made.
    """
    if num_places < MIN_PLACES:
        raise ConfigError(f"--places must be at least {MIN_PLACES}, got {num_places}")
    folder = _cleared(Path(out))
    clock = _Clock(say)
    start = time.monotonic()
    with clock.step("draw", f"drawing {num_places} places x {len(HEADINGS)} headings"):
        places = make_places(num_places, seed)
        table, _ = make_photos(folder, places, seed=seed)
    with clock.step("pack", f"geoloc pack {table} --out {folder / 'shards'}"):
        pack(table, folder / "shards", shard_photos=-(-num_places * len(HEADINGS) // NUM_SHARDS))
    with clock.step("embed", f"geoloc embed {folder / 'shards'} --out {folder / 'emb'} --encoder demo"):
        shards, emb = str(folder / "shards"), str(folder / "emb")
        embedded = embed(from_flat(EmbedConfig, {"shards": shards, "out": emb, "encoder": "demo"}))
    photos = _read(folder / "emb")
    is_test_P = np.random.default_rng([seed, 9]).permutation(num_places) < TEST_SHARE * num_places
    with clock.step("head", "building H3 cells and training a head on the embeddings of the training places"):
        encoder_sha256 = str(read_config(folder / "emb")["encoder_sha256"])
        cells = _make_head(folder / "head", photos, is_test_P, encoder_sha256, seed)
    head = ["--head", str(folder / "head" / "best.pt"), "--cells", str(folder / "head" / "geocell_info.json")]
    with clock.step("predict", f"geoloc predict --from-embeddings {emb} --out {folder / 'pred'} {' '.join(head)}"):
        flags = {"from_embeddings": emb, "out": str(folder / "pred"), "head": head[1], "cells": head[3]}
        predict(from_flat(PredictConfig, flags))
    metrics = _measure(folder, photos, is_test_P, cells)
    seconds = {**clock.seconds, "all": round(time.monotonic() - start, 1)}
    result = {
        "images": embedded.rows,
        "images_per_second": embedded.images_per_second,
        **metrics,
        "seconds": seconds,
        "out": str(out),
    }
    (folder / _MARK).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(_table(result, len(cells), int(is_test_P.sum())))
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


def _read(emb: Path) -> _Embedded:
    pairs = [read_features(unit.source) for unit in plan_embeddings(emb)]
    table = pa.concat_tables([pair.table.select(["location", "lat", "lon"]) for pair in pairs])
    return _Embedded(
        feature_ND=np.concatenate([pair.features_ND for pair in pairs]),
        place_N=table["location"].to_numpy().astype(np.int64),
        point_deg_N2=np.stack([table["lat"].to_numpy(), table["lon"].to_numpy()], axis=1),
    )


def _make_head(
    folder: Path, photos: _Embedded, is_test_P: NDArray[np.bool_], encoder_sha256: str, seed: int
) -> Partition:
    """Cells and a head from the training places alone; the test places have a hand in neither."""
    is_train_N = ~is_test_P[photos.place_N]
    cells, cell_N = build_h3(photos.point_deg_N2[is_train_N], RESOLUTION)
    state = train_head(photos.feature_ND[is_train_N], cell_N, len(cells), seed=seed)
    folder.mkdir()
    cells.save(folder / "geocell_info.json")
    remarks = {"tap": "pooled", "encoder_sha256": encoder_sha256, "partition_fingerprint": cells.fingerprint}
    save_head(folder / "best.pt", state, remarks=remarks)
    return cells


def _measure(folder: Path, photos: _Embedded, is_test_P: NDArray[np.bool_], cells: Partition) -> dict[str, Any]:
    """Errors of the test places, each from the mean of its photos' features, and of the commonest cell."""
    num_places = len(is_test_P)
    count_P = np.bincount(photos.place_N, minlength=num_places)
    sum_PD = np.zeros((num_places, photos.feature_ND.shape[1]))
    np.add.at(sum_PD, photos.place_N, photos.feature_ND)
    first_P = np.unique(photos.place_N, return_index=True)[1]
    point_P2 = photos.point_deg_N2[first_P]
    import torch

    head = load_head(folder / "head" / "best.pt", cells)
    fused = torch.from_numpy((sum_PD / count_P[:, None]).astype(np.float32))[torch.from_numpy(is_test_P)]
    located = head.locate(fused)
    truth_T2 = point_P2[is_test_P]
    error_T = haversine_km(truth_T2, located.position_deg)
    cell_of_all = cells.assign(point_P2[:, 0], point_P2[:, 1])
    commonest = np.bincount(cell_of_all[~is_test_P], minlength=len(cells)).argmax()
    guess_T = haversine_km(truth_T2, np.broadcast_to(cells.centroids_deg[commonest], truth_T2.shape))
    draw_figure(folder / "figure.png", truth_T2, located.position_deg, error_T, guess_T)
    return {
        "top1": round(float((located.topk_cell[:, 0] == cell_of_all[is_test_P]).mean()), 4),
        "median_km": round(float(np.median(error_T)), 1),
        "photo_median_km": round(_photo_median_km(folder / "pred", is_test_P), 1),
        "guess_km": round(float(np.median(guess_T)), 1),
        "better": round(float(np.median(guess_T) / np.median(error_T)), 2),
    }


def _photo_median_km(pred: Path, is_test_P: NDArray[np.bool_]) -> float:
    """The median error of the test places' photos, from the files that predict wrote."""
    columns = ["lat", "lon", "meta_lat", "meta_lon", "meta_location"]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in sorted(pred.glob("predictions/*"))])
    lat, lon, true_lat, true_lon, place = (table[name].to_numpy() for name in columns)
    is_test_N = is_test_P[place.astype(np.int64)]
    error_N = haversine_km(np.stack([true_lat, true_lon], axis=1), np.stack([lat, lon], axis=1))
    return float(np.median(error_N[is_test_N]))


def _table(result: dict[str, Any], num_cells: int, num_test: int) -> str:
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    return "\n".join(
        [
            f"{result['images']} photos embedded, {result['images_per_second']:.0f} a second; {seconds}",
            f"{num_test} places that the head has never seen, {num_cells} cells, four photos a place:",
            f"  in the right cell          {result['top1']:8.1%}",
            f"  median error               {result['median_km']:8.0f} km",
            f"  of a single photo          {result['photo_median_km']:8.0f} km",
            f"  of the commonest cell      {result['guess_km']:8.0f} km   ({result['better']:.1f} times as far)",
            f"figure: {result['out']}/figure.png",
        ]
    )
