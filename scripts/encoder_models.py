"""Image towers to measure: their shapes, random weights and pixels, and how far ours are from open_clip's forward."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from model_sizes import LARGE_SIZE, SMALL_SIZE, ModelSize, vision_config
from torch import Tensor

from geoloc_batch.model.checkpoint import ClipConfig, Normalization, TowerConfig
from geoloc_batch.model.choice import choose_sdpa, is_measured, read_choice
from geoloc_batch.model.clip import Clip, build_clip, describe, fill
from geoloc_batch.model.compile_cache import OFF
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.model.tower import attention_shape

# Largest error of a feature against open_clip in fp32, relative to the feature's length.
FIDELITY = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 1e-1}


TEXT = TowerConfig(width=64, mlp_width=64, layers=1, heads=1, activation="quick_gelu", norm_eps=1e-5)


@dataclass(frozen=True, kw_only=True)
class Case(ModelSize):
    """One model at one batch size."""

    precisions: tuple[str, ...]
    """Of ours; the baselines run in the first."""

    def flop(self) -> float:
        """Of one photo, every token through every layer: what we leave out in the last layer is not subtracted."""
        patches = (self.side // self.patch) ** 2
        tokens = patches + 1
        # Queries, keys, values and output: 4 W^2; the MLP: 8 W^2; scores and their use: 2 T W. Each twice: * and +.
        layer = 2 * tokens * 12 * self.width**2 + 4 * tokens**2 * self.width
        return self.layers * layer + 2 * patches * 3 * self.patch**2 * self.width


SMALL = Case(**vars(SMALL_SIZE), precisions=("fp32",))


BASE = Case(name="ViT-B/32", layers=12, width=768, patch=32, side=224, batch=32, precisions=("fp32", "bf16"))


LARGE = Case(**vars(LARGE_SIZE), precisions=("bf16",))


TINY = Case(name="ViT 2x64", layers=2, width=64, patch=8, side=32, batch=4, precisions=("fp32", "bf16"))


def make_clip(case: Case) -> Clip:
    """An open_clip model with random weights that keep features of ordinary size."""
    vision = TowerConfig(
        width=case.width,
        mlp_width=4 * case.width,
        layers=case.layers,
        heads=case.heads,
        activation="quick_gelu",
        norm_eps=1e-5,
    )
    config = ClipConfig(
        vision=vision,
        text=TEXT,
        image_size=case.side,
        patch_size=case.patch,
        projection=64,
        vocab_size=64,
        context_length=8,
        eos_id=None,
    )
    module = build_clip(config)
    generator = torch.Generator().manual_seed(0)
    state = {name: draw(name, tensor.shape, generator) for name, tensor in sorted(module.state_dict().items())}
    fill(module, state)
    return describe(module, config, Normalization(), name=case.name, sha256="", licence=None)


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights of one tensor."""
    noise = torch.randn(shape, generator=generator)
    if ".ln_" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    return noise * (0.5 * max(shape[1:].numel(), 64) ** -0.5 if shape else 1.0)


def make_pixels(case: Case) -> Tensor:
    """[B, 3, S, S] uint8, channels last in memory, as decoders write them."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.side, case.side, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def normalized(pixels: Tensor) -> Tensor:
    """What CLIPImageProcessor would hand over."""
    mean, std = (
        torch.tensor(part, device=pixels.device)[:, None, None] for part in (Normalization().mean, Normalization().std)
    )
    return ((pixels.float() / 255 - mean) / std).contiguous()


def encoder_of(
    clip: Clip,
    case: Case,
    device: torch.device,
    precision: str,
    *,
    compiled: bool,
    compile_cache: str = OFF,
    sdpa: str = "",
    compile_mode: str = "",
) -> Encoder:
    """Ours, the pooled tap, which is what heads take; what is left open as `load_encoder` chooses it."""
    encoder = Encoder(
        clip,
        tap="pooled",
        precision=precision,
        batch_size=case.batch,
        compiled=compiled,
        compile_cache=compile_cache,
        device=device,
    )
    if is_measured(device):
        shape = attention_shape(encoder.tower)
        encoder.settle(sdpa=sdpa or _choose_once(shape, device=device, batch_size=case.batch))
        kept = read_choice(encoder.cache_root(), encoder.graph_facts())
        if kept is not None:
            encoder.settle(sdpa=sdpa or kept.sdpa, compile_mode=kept.compile_mode)
    encoder.settle(sdpa=sdpa, compile_mode=compile_mode)
    return encoder


# Contenders of one run differ in nothing but what they are named for.
_choose_once = functools.cache(choose_sdpa)


def traced(encoder: Encoder) -> Encoder:
    """The same, its graph made as `compiled` makes it, and then run as it is: seconds instead of a minute."""
    encoder._run = torch.compile(encoder.tower, dynamic=False, fullgraph=True, backend="eager")
    return encoder


def open_clip_tower(clip: Clip) -> Any:
    """A copy of open_clip's own tower, for the pooled tap."""
    visual: Any = copy.deepcopy(clip.module.visual)
    visual.proj = None
    return visual


def transformers_tower(case: Case) -> Any:
    """A CLIP image tower of transformers with random weights, attention by SDPA."""
    from transformers import CLIPVisionModel

    config = vision_config(case, attn_implementation="sdpa")
    return CLIPVisionModel(config).eval().requires_grad_(False)


def reference_features(clip: Clip, pixels: Tensor) -> Tensor:
    """Features of the first four photos by open_clip's forward, in fp32 on the CPU."""
    with torch.inference_mode():
        features: Tensor = open_clip_tower(clip)(normalized(pixels[:4].cpu()))
        return features


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Largest error of a feature, relative to its length, over the rows that are expected."""
    few = ours[: len(expected)].cpu()
    return float(((few - expected).norm(dim=1) / expected.norm(dim=1)).max())
