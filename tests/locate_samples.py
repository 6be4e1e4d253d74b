"""Heads and cells for tests of locating."""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoloc_batch.geo.located import Located
from geoloc_batch.geo.partition import Partition
from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.locate.head_file import TENSORS, Head

C, D = 7, 5


def make_state(num_cells: int, dim: int, *, seed: int = 0, sharpness: float = 0.7) -> dict[str, Tensor]:
    """The four tensors of a head with clear favourites, by their published names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "head.0.weight": 1 + 0.1 * torch.randn(dim, generator=generator),
        "head.0.bias": 0.1 * torch.randn(dim, generator=generator),
        "head.2.weight": sharpness * torch.randn(num_cells, dim, generator=generator),
        "head.2.bias": 0.1 * torch.randn(num_cells, generator=generator),
    }


def make_partition(num_cells: int, *, seed: int = 0) -> Partition:
    """Cells 0 to C - 1 all over the globe."""
    centroids = np.random.default_rng(seed).uniform([-90, -180], [90, 180], (num_cells, 2))
    return Partition(ids=np.arange(num_cells), centroids_deg=centroids)


def make_features(num_rows: int, dim: int, *, seed: int = 1) -> Tensor:
    """[B, D] with the offset and spread of an encoder's pooled features."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 1.7 * torch.randn(num_rows, dim, generator=generator)


def head_of(state: dict[str, Tensor], **remarks: str) -> Head:
    """A head without a file."""
    return Head(
        path="best.pt",
        sha256="0" * 64,
        norm_weight=state["head.0.weight"],
        norm_bias=state["head.0.bias"],
        weight=state["head.2.weight"],
        bias=state["head.2.bias"],
        **remarks,  # type: ignore[arg-type]
    )


def constant_head(logits: list[float], *, dim: int = 3) -> Head:
    """A head that answers the same logits whatever it sees."""
    state = make_state(len(logits), dim)
    state["head.2.weight"].zero_()
    state["head.2.bias"] = torch.tensor(logits, dtype=torch.float32)
    return head_of(state)


def posterior_of(logits: list[float], centroids_deg: Any, **options: Any) -> HeadLocator:
    """A locator that gives every row the same posterior over the given centroids."""
    centroids = np.array(centroids_deg, dtype=np.float64)
    return HeadLocator(constant_head(logits), Partition(ids=np.arange(len(logits)), centroids_deg=centroids), **options)


def published_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the training script of the published heads leaves beside the weights, and more of the same kinds."""
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    counts: collections.defaultdict[str, list[float]] = collections.defaultdict(list)
    counts["val"].append(0.63)
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if not callable(value)},
        "scaler": {"scale": 65536.0, "_growth_tracker": 7},
        "epoch": 12,
        "best_score": np.float64(63.1),
        "metrics": {
            "balscore": np.float32(63.1),
            "top1": np.float16(0.297),
            "cells": np.int64(1898),
            "done": np.bool_(True),
            "name": np.str_("lam_0.05"),
            "confusion": np.arange(6, dtype=">i4").reshape(2, 3),
            "errors": np.array([51.9, np.nan], dtype=np.float32).T,
            "mixed": np.array([1, "a", None], dtype=object),
            "record": np.zeros(2, dtype=[("km", "f4"), ("id", "i8")]),
        },
        "args": argparse.Namespace(out=Path("runs/v13"), lr=np.float64(1e-3), cells=[1, 2], fusion="feature"),
        "history": counts,
        "rng": {"numpy": np.random.default_rng(0).bit_generator.state, "torch": torch.get_rng_state()},
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(a=1),
        "shape": torch.Size([3]),
        "dtype": torch.float16,
        "flags": {1, 2},
    }


def write_head(
    folder: Path, *, num_cells: int = 7, dim: int = 5, seed: int = 0, cells: bool = True, name: str = "best.pt"
) -> Path:
    """A best.pt, with its geocell_info.json beside it unless `cells` is false."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": make_state(num_cells, dim, seed=seed)}, folder / name)
    if cells:
        make_partition(num_cells, seed=seed).save(folder / "geocell_info.json")
    return folder / name


def quick_start(state: dict[str, Tensor], features_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[B, k] probabilities and cells as the published heads' quick start gets them: a Sequential, soft-max, topk."""
    num_cells, dim = state["head.2.weight"].shape
    layers = torch.nn.Sequential(torch.nn.LayerNorm(dim), torch.nn.Dropout(0.3), torch.nn.Linear(dim, num_cells))
    layers = layers.to(features_BD.dtype)
    layers.load_state_dict({name.removeprefix("head."): tensor for name, tensor in state.items()})
    with torch.no_grad():
        best = layers.eval()(features_BD).softmax(-1).topk(k)
    return best.values, best.indices


def write_remarks(folder: Path, remarks: object) -> None:
    (folder / "head.json").write_text(json.dumps(remarks), encoding="utf-8")


def assert_holds(head: Head, state: Mapping[str, Tensor]) -> None:
    """Whether a head that was read is that state, in float32."""
    read = (head.norm_weight, head.norm_bias, head.weight, head.bias)
    for name, tensor in zip(TENSORS, read, strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float()), name


def make_locator(num_cells: int, dim: int, **options: Any) -> HeadLocator:
    """A locator of such a head."""
    return HeadLocator(head_of(make_state(num_cells, dim)), make_partition(num_cells), **options)


def same_bits(a: Located, b: Located) -> bool:
    """Whether two answers are the same to the bit."""
    return all(getattr(a, each.name).tobytes() == getattr(b, each.name).tobytes() for each in fields(Located))
