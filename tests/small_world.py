"""A small but real world for end-to-end tests: a CLIP checkpoint, a head, cells, photos and shards, all made here."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

NUM_CELLS, IMAGE_SIZE, DIM = 37, 56, 48
COUNTS = [5, 9, 1, 12]
"""Photos in each shard of a World."""
BATCH = 8


def make_checkpoint(folder: Path, *, image_size: int = IMAGE_SIZE, hidden_act: str = "quick_gelu") -> Path:
    """A Hugging Face CLIP checkpoint with random weights: config, preprocessor, safetensors."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(7)
    vision = CLIPVisionConfig(
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        projection_dim=32,
        hidden_act=hidden_act,
    )
    text = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        hidden_act=hidden_act,
        bos_token_id=97,
        eos_token_id=98,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    model = CLIPModel(config).eval()
    # Default initialisation is so narrow that all photos look alike; this keeps the features apart.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    size = {"shortest_edge": image_size}
    CLIPImageProcessor(size=size, crop_size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def make_head(folder: Path, *, num_cells: int = NUM_CELLS, dim: int = DIM, seed: int = 0) -> tuple[Path, Path]:
    """best.pt and geocell_info.json as published heads have them; the head is sharp enough to have clear favourites."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "head.0.weight": 1 + 0.1 * torch.randn(dim, generator=generator),
        "head.0.bias": 0.1 * torch.randn(dim, generator=generator),
        "head.2.weight": 0.7 * torch.randn(num_cells, dim, generator=generator),
        "head.2.bias": 0.1 * torch.randn(num_cells, generator=generator),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "epoch": 3}, folder / "best.pt")
    rng = np.random.default_rng(seed)
    cells = {
        str(cell): {"centroid_lat": float(rng.uniform(36, 70)), "centroid_lon": float(rng.uniform(-10, 40))}
        for cell in range(num_cells)
    }
    (folder / "geocell_info.json").write_text(json.dumps(cells))
    return folder / "best.pt", folder / "geocell_info.json"


def draw_jpeg(seed: int, *, width: int = 90, height: int = 70) -> bytes:
    """A small photo: coarse noise, so that no two look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8), "RGB")
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar of the members, in order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shards(folder: Path, counts: Sequence[int], *, seed: int = 0) -> list[Path]:
    """One shard per count, its photos with a json each."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, photo = [], seed
    for index, count in enumerate(counts):
        members: list[tuple[str, bytes]] = []
        for row in range(count):
            key = f"{index:02d}/{row:04d}"
            members.append((f"{key}.jpg", draw_jpeg(photo)))
            members.append((f"{key}.json", json.dumps({"lat": 40 + row / 100, "place": f"p{photo}"}).encode()))
            photo += 1
        shards.append(write_tar(folder / f"{index:06d}.tar", members))
    return shards


def tree_bytes(out: Path) -> dict[str, bytes]:
    """Every result file of a run by its path below `out`: what must not differ between two runs."""
    trees = [path for path in out.rglob("*") if path.is_file() and not path.relative_to(out).parts[0].startswith("_")]
    return {str(path.relative_to(out)): path.read_bytes() for path in trees if path.name != "run.json"}


@dataclass(frozen=True)
class World:
    """Where everything is, and the flags that name it."""

    root: Path
    checkpoint: Path
    head: Path
    cells: Path
    shards: Path

    @property
    def encoder_flags(self) -> list[str]:
        return ["--encoder", str(self.checkpoint), "--batch-size", str(BATCH)]

    @property
    def head_flags(self) -> list[str]:
        return ["--head", str(self.head), "--cells", str(self.cells)]


def predictions(out: Path, tree: str = "") -> list[dict[str, Any]]:
    """Every row of a run, in the order of the units."""
    rows: list[dict[str, Any]] = []
    for path in sorted((out / tree / "predictions").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = 60) -> None:
    """Wait until something has happened in a process that goes on meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended early with {process.returncode}"
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.005)
