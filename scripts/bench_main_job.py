"""The main job against the published quick start's loop, on photos and a checkpoint made here.

    python scripts/bench_main_job.py
    python scripts/bench_main_job.py --photos 512 --repeats 5

Baseline: the quick start as published, one photo at a time: PIL, CLIPImageProcessor, CLIPModel.vision_model, head,
soft-max, top 5; fp32. Ours: `predict` from a tar shard to files on disk, fp32, uncompiled, ledger and fsync included.
Same photos (640 x 640 JPEG), same checkpoint (ViT of 4 layers x 384, patch 32, 224 px: about 0.75 GFLOP a photo, so
that decoding weighs as it does beside a GPU). Interleaved, medians; the answers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from geoloc_batch import pack, predict

SIDE, NUM_CELLS, DIM = 224, 1898, 384
FLOOR = 1.0


def main() -> int:
    """Compare, measure, print; exit 0 when the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_photos(folder / "photos", options.photos)
        make_parts(folder)
        pack(folder / "photos", folder / "shards")
        quick_s, ours_s = [], []
        for repeat in range(options.repeats + 1):
            expected, quick = quick_start(folder)
            run = predict(folder / "shards", out=folder / f"out{repeat}", **parts(folder))
            if repeat == 0:  # warms caches and proves that both compute the same
                compare(expected, folder / "out0")
                continue
            # Both clocks start when the model is loaded.
            quick_s.append(quick)
            ours_s.append(run.seconds)
            limit = run.limiting_stage
            print(f"quick start {quick_s[-1]:.2f} s, ours {ours_s[-1]:.2f} s, limited by {limit}", file=sys.stderr)
    quick, ours = (options.photos / statistics.median(times) for times in (quick_s, ours_s))
    ratio = round(ours / quick, 3)
    bars = [
        bar("predict / quick start", ratio, "ratio", FLOOR),
        bar("predict", round(ours, 1), "images/s"),
        bar("quick start", round(quick, 1), "images/s"),
    ]
    machine = {"processor": platform.processor() or platform.machine(), "cpus": len(os.sched_getaffinity(0))}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    print(json.dumps({"bench": "main_job", "machine": machine, "versions": versions, "bars": bars}))
    return 0 if ratio >= FLOOR else 1


def bar(name: str, value: float, unit: str, floor: float | None = None) -> dict[str, object]:
    """One figure, and whether it reaches its floor."""
    met = None if floor is None else value >= floor
    return {"name": name, "value": value, "floor": floor, "goal": None, "unit": unit, "met": met}


def make_photos(folder: Path, count: int) -> None:
    """640 x 640 JPEGs of street-like size (60-130 KB): smooth ground, fine grain."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse = coarse.resize((640, 640), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 9, (640, 640, 1))
        photo = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{index:05d}.jpg", quality=85)


def make_parts(folder: Path) -> None:
    """A checkpoint and a head with random weights, in the published formats."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=32,
    )
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=62,
        eos_token_id=63,
    )
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder / "clip")
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder / "clip")
    state = {
        "head.0.weight": torch.ones(DIM),
        "head.0.bias": torch.zeros(DIM),
        "head.2.weight": torch.randn(NUM_CELLS, DIM),
        "head.2.bias": torch.zeros(NUM_CELLS),
    }
    torch.save({"model": state}, folder / "best.pt")
    cells = {str(cell): {"centroid_lat": 35 + cell / 60, "centroid_lon": cell / 80} for cell in range(NUM_CELLS)}
    (folder / "geocell_info.json").write_text(json.dumps(cells))


def parts(folder: Path) -> dict[str, object]:
    """The flags that name the checkpoint, the head and the cells."""
    return {
        "encoder": folder / "clip",
        "head": folder / "best.pt",
        "cells": folder / "geocell_info.json",
        "precision": "fp32",
        "batch_size": 32,
    }


def quick_start(folder: Path) -> tuple[dict[str, list[int]], float]:
    """The published loop. Gives the five best cells by photo, and the seconds of the loop."""
    from transformers import CLIPImageProcessor, CLIPModel

    clip = CLIPModel.from_pretrained(folder / "clip").vision_model.eval()
    processor = CLIPImageProcessor.from_pretrained(folder / "clip")
    state = torch.load(folder / "best.pt", weights_only=True)["model"]
    norm, linear = torch.nn.LayerNorm(DIM), torch.nn.Linear(DIM, NUM_CELLS)
    norm.load_state_dict({"weight": state["head.0.weight"], "bias": state["head.0.bias"]})
    linear.load_state_dict({"weight": state["head.2.weight"], "bias": state["head.2.bias"]})
    answers: dict[str, list[int]] = {}
    start = time.perf_counter()
    with torch.no_grad():
        for path in sorted((folder / "photos").iterdir()):
            image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
            probs = linear(norm(clip(pixel_values=pixels).pooler_output.float())).softmax(-1)
            answers[path.stem] = probs[0].topk(5).indices.tolist()
    return answers, time.perf_counter() - start


def compare(expected: dict[str, list[int]], out: Path) -> None:
    """Both must name the same cells; otherwise there is nothing to time."""
    rows = [row for path in sorted((out / "predictions").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(expected), f"{len(rows)} rows for {len(expected)} photos"
    differing = [row["key"] for row in rows if row["topk_cell"] != expected[row["key"]]]
    # Random weights leave near ties among 1898 cells: the last places of a few photos may swap.
    assert len(differing) <= 0.02 * len(rows), f"other cells for {differing[:5]}"


if __name__ == "__main__":
    raise SystemExit(main())
