"""The `demo` encoder: a small CLIP whose weights come from a seed, so that everything runs without a download.

Nothing was learned: it is a random projection that keeps colours and where they stand, enough for a head to learn from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geoloc_batch.model.checkpoint import ClipConfig, Normalization, TowerConfig
from geoloc_batch.model.clip import CLIP_VOCABULARY, Clip, build_clip, describe, fill
from geoloc_batch.model.weights import sha256_of_tensors

SEED = 20240229
CONFIG = ClipConfig(
    vision=TowerConfig(width=192, mlp_width=768, layers=4, heads=3, activation="gelu", norm_eps=1e-5),
    text=TowerConfig(width=64, mlp_width=256, layers=2, heads=1, activation="gelu", norm_eps=1e-5),
    image_size=56,
    patch_size=14,
    projection=128,
    vocab_size=CLIP_VOCABULARY,
    context_length=77,
    eos_id=None,
)
# Against patch embeddings of about 1: a patch's place must count beside its colour, or the attention mixes all places.
# Of the scales tried, these let a ridge regression recover most of what a scene was drawn from.
POSITION_STD = 2.0
CLASS_STD = 1.0
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


def load_demo() -> Clip:
    """The demo model: the same tensors, bit for bit, in every process and on every machine."""
    module = build_clip(CONFIG)
    state = seeded_state({key: tuple(tensor.shape) for key, tensor in module.state_dict().items()})
    fill(module, state)
    return describe(module, CONFIG, Normalization(), name="demo", sha256=sha256_of_tensors(state), licence=None)


def seeded_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights for these shapes, drawn in the order of their names.

    Uniform numbers, scaled: unlike torch's normal ones they take no transcendental function, whose last bit differs
    between processors.
    """
    generator = torch.Generator().manual_seed(SEED)
    return {key: _draw(key, shape, generator) for key, shape in sorted(shapes.items())}


def _draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tower = CONFIG.vision if key.startswith("visual.") else CONFIG.text
    if key == "logit_scale":
        return torch.full(shape, INITIAL_LOGIT_SCALE)
    if key.endswith("bias"):
        return torch.zeros(shape)
    if ".ln_" in key or key.startswith("ln_"):
        return torch.ones(shape)
    residual = tower.width**-0.5 * (2 * tower.layers) ** -0.5
    if key.endswith("positional_embedding"):
        std = POSITION_STD
    elif key.endswith("class_embedding"):
        std = CLASS_STD
    elif key.endswith("conv1.weight"):
        std = math.prod(shape[1:]) ** -0.5
    elif key.endswith(("out_proj.weight", "c_proj.weight")):
        std = residual
    elif key.endswith("c_fc.weight"):
        std = (2 * tower.width) ** -0.5
    else:
        std = tower.width**-0.5
    # A uniform number over [-a, a] has the standard deviation a / sqrt(3).
    return (torch.rand(shape, generator=generator) - 0.5) * (2 * math.sqrt(3) * std)
