"""Photos and stored embeddings of locations, for tests of grouped prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from small_world import draw_jpeg, write_tar
from store_samples import write_pair

from geoloc_batch.records import Sample, Unit

DIM, NUM_CELLS = 24, 37


def write_embeddings(folder: Path, pairs: Sequence[Sequence[Any]], *, seed: int = 0) -> Path:
    """Pairs whose photos show these places; None shows none. Features are of very different lengths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(pairs):
        unit = Unit(index=index, kind="shard", source=f"shards/{index}.tar")
        samples = [
            Sample(unit, unit.source, row, f"{index}/{row}", meta_of(value, row)) for row, value in enumerate(values)
        ]
        features = rng.normal(0.3, 1, (len(values), DIM)) * rng.uniform(0.2, 20, (len(values), 1))
        write_pair(folder, samples, features.astype(np.float32), index)
    return folder


def meta_of(place: Any, row: int) -> bytes:
    return json.dumps({"heading": 90 * row, "town": f"town of {place}"} | ({"place": place} if place else {})).encode()


def write_shard(path: Path, places: Sequence[str | None], *, first_photo: int = 0) -> Path:
    """A tar with a photo for each of the places."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members: list[tuple[str, bytes]] = []
    for row, place in enumerate(places):
        members.append((f"{row:04d}.jpg", draw_jpeg(first_photo + row)))
        members.append((f"{row:04d}.json", meta_of(place, row)))
    return write_tar(path, members)


def raw_features(folder: Path) -> dict[str, torch.Tensor]:
    """[V, D] the features of each place before they were normalised, read with nothing of the package."""
    found: dict[str, list[np.ndarray]] = {}
    for npy in sorted((folder / "img_emb").glob("*.npy")):
        table = pq.read_table(folder / "metadata" / npy.name.replace("img_emb", "metadata").replace(".npy", ".parquet"))
        raw = np.load(npy).astype(np.float32) * table["emb_norm"].to_numpy()[:, None]
        for row, place in enumerate(table["place"].to_pylist()):
            if place is not None:
                found.setdefault(str(place), []).append(raw[row])
    return {place: torch.from_numpy(np.stack(rows)) for place, rows in found.items()}


def quick_start(head: Path, features_VD: torch.Tensor) -> np.ndarray:
    """[C] probabilities of a location as the published heads' quick start gets them, from the mean over its views."""
    state = torch.load(head, weights_only=True)["model"]
    num_cells, dim = state["head.2.weight"].shape
    layers = torch.nn.Sequential(torch.nn.LayerNorm(dim), torch.nn.Dropout(0.3), torch.nn.Linear(dim, num_cells)).eval()
    layers.load_state_dict({name.removeprefix("head."): tensor for name, tensor in state.items()})
    with torch.no_grad():
        probs: np.ndarray = layers(features_VD.mean(dim=0, keepdim=True)).softmax(-1)[0].numpy()
    return probs


def errors_of(out: Path) -> list[tuple[str, int, str]]:
    """Shard, row and stage of each error row."""
    tables = sorted((out / "errors").glob("*.parquet"))
    return [(row["shard"], row["row"], row["stage"]) for table in tables for row in pq.read_table(table).to_pylist()]
