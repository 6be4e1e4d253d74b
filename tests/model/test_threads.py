"""Features do not depend on the number of threads, nor on how a batch is cut for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoloc_batch.model.chunks import Chunks, chunk_size

# Shapes at which MKL (fp32) and oneDNN (bf16) cut their sums by the number of threads.
THREADS_PROGRAM = """
import hashlib, json, sys, torch
from geoloc_batch.model.checkpoint import ClipConfig, Normalization, TowerConfig
from geoloc_batch.model.clip import build_clip, describe, fill
from geoloc_batch.model.encoder import Encoder, load_encoder
demo = load_encoder("demo", batch_size=7, device="cpu", precision="fp32")
def tower(layers, width):
    heads = width // 64
    return TowerConfig(width=width, mlp_width=4 * width, layers=layers, heads=heads, activation="gelu", norm_eps=1e-5)
config = ClipConfig(vision=tower(2, 768), text=tower(1, 64), image_size=224, patch_size=32, projection=64,
                    vocab_size=64, context_length=8, eos_id=None)
module = build_clip(config)
generator = torch.Generator().manual_seed(0)
fill(module, {name: torch.rand(tensor.shape, generator=generator) * 0.1 - 0.05
              for name, tensor in sorted(module.state_dict().items())})
clip = describe(module, config, Normalization(), name="it", sha256="", licence=None)
pixels = torch.randint(0, 256, (32, 3, 224, 224), dtype=torch.uint8, generator=generator)
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    seen = [demo.encode(torch.arange(7 * 3 * 56 * 56).remainder(251).to(torch.uint8).view(7, 3, 56, 56))]
    for precision in ("fp32", "bf16"):
        how = {"tap": "pooled", "precision": precision, "batch_size": 32, "compiled": False}
        seen.append(Encoder(clip, device=torch.device("cpu"), **how).encode(pixels))
    assert torch.get_num_threads() == threads
    print(json.dumps([hashlib.sha256(feature.numpy().tobytes()).hexdigest() for feature in seen]))
"""


def features_on(*threads: int) -> list[list[str]]:
    """Hashes of three encoders' features, for each number of threads, from one process."""
    command = [sys.executable, "-c", THREADS_PROGRAM, *map(str, threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_features_do_not_depend_on_the_number_of_threads() -> None:
    alone, together = features_on(1, 3)
    assert len(set(alone)) == 3
    assert alone == together


@pytest.mark.slow
def test_features_do_not_depend_on_the_process_nor_its_number_of_threads() -> None:
    assert features_on(1) == features_on(3) == features_on(2)


@given(batch_size=st.integers(1, 2000), num_tokens=st.one_of(st.none(), st.integers(2, 1000)))
def test_chunks_share_a_batch_out_evenly(batch_size: int, num_tokens: int | None) -> None:
    size = chunk_size(batch_size, num_tokens)
    num_chunks = -(-batch_size // size)
    assert size == 1 or size * (num_tokens or 50) <= 400
    # Photos that fill up the last chunk are computed for nothing: fewer than there are chunks.
    assert 0 <= size * num_chunks - batch_size < num_chunks


def test_a_fault_of_a_chunk_reaches_the_caller_and_threads_are_left_as_they_were() -> None:
    def fail(pixels: torch.Tensor) -> torch.Tensor:
        if pixels.any():
            raise RuntimeError("out of memory")
        return pixels.flatten(1).float()

    before = torch.get_num_threads()
    chunks = Chunks(fail, size=2, num_threads=2)
    assert chunks(torch.zeros(5, 2, 2, 3, dtype=torch.uint8)).shape == (5, 12)
    with pytest.raises(RuntimeError, match="out of memory"):
        chunks(torch.ones(5, 2, 2, 3, dtype=torch.uint8))
    assert torch.get_num_threads() == before
