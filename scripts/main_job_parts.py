"""What bench_main_job.py runs on: models of three sizes, a checkpoint and a head with random weights, shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from model_sizes import LARGE_SIZE, SMALL_SIZE, ModelSize, vision_config
from quick_start import processor_for
from stream_photos import write_shard

NUM_CELLS = 1898


@dataclass(frozen=True, kw_only=True)
class Case(ModelSize):
    """One model, and how much of it is measured."""

    precision: str
    photos: int
    """Of each round."""
    per_shard: int
    quick_photos: int
    """Of these, how many the quick start's loop gets."""
    model_seconds: float
    """At least, of the encoder alone, before and after each round."""


SMALL = Case(**vars(SMALL_SIZE), precision="fp32", photos=256, per_shard=64, quick_photos=256, model_seconds=0.5)
LARGE = Case(
    **vars(LARGE_SIZE),
    precision="bf16",
    # About 18 s at 1,345 images/s: filling and emptying the pipeline, about a batch, is to count for little.
    photos=24576,
    per_shard=2048,
    quick_photos=128,
    model_seconds=3.0,
)
TINY = replace(SMALL, name="ViT 1x64", layers=1, width=64, photos=48, per_shard=32, quick_photos=32, model_seconds=0.1)


def make_shards(case: Case, folder: Path, photos: Sequence[bytes]) -> None:
    """Tars of 640 x 640 JPEGs of street-like size (60-130 KB)."""
    folder.mkdir()
    turns = cycle(photos)
    for number, first in enumerate(range(0, case.photos, case.per_shard)):
        few = islice(turns, min(case.per_shard, case.photos - first))
        write_shard(folder / f"{number:06d}.tar", list(few))


def make_parts(case: Case, folder: Path) -> None:
    """A checkpoint and a head with random weights, in the published formats."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=62,
        eos_token_id=63,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config(case).to_dict())
    CLIPModel(config).save_pretrained(folder / "clip")
    processor_for(case.side).save_pretrained(folder / "clip")
    state = {
        "head.0.weight": torch.ones(case.width),
        "head.0.bias": torch.zeros(case.width),
        "head.2.weight": torch.randn(NUM_CELLS, case.width),
        "head.2.bias": torch.zeros(NUM_CELLS),
    }
    torch.save({"model": state}, folder / "best.pt")
    cells = {str(cell): {"centroid_lat": 35 + cell / 60, "centroid_lon": cell / 80} for cell in range(NUM_CELLS)}
    (folder / "geocell_info.json").write_text(json.dumps(cells))
