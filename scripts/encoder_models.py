"""Image towers to measure: their shapes, random weights and pixels, and how far ours are from open_clip's forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoloc_batch.model.checkpoint import ClipConfig, Normalization, TowerConfig
from geoloc_batch.model.clip import Clip, build_clip, describe, fill
from geoloc_batch.model.encoder import Encoder

# Largest error of a feature against open_clip in fp32, relative to the feature's length.
FIDELITY = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 1e-1}


TEXT = TowerConfig(width=64, mlp_width=64, layers=1, heads=1, activation="quick_gelu", norm_eps=1e-5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model at one batch size."""

    name: str
    layers: int
    width: int
    patch: int
    side: int
    batch: int
    precisions: tuple[str, ...]
    """Of ours; the baselines run in the first."""
    compiled: tuple[str, ...] = ("ours", "open_clip", "transformers")

    def flop(self) -> float:
        """Of one photo, every token through every layer: what we leave out in the last layer is not subtracted."""
        patches = (self.side // self.patch) ** 2
        tokens = patches + 1
        # Queries, keys, values and output: 4 W^2; the MLP: 8 W^2; scores and their use: 2 T W. Each twice: * and +.
        layer = 2 * tokens * 12 * self.width**2 + 4 * tokens**2 * self.width
        return self.layers * layer + 2 * patches * 3 * self.patch**2 * self.width


SMALL = Case(name="ViT 4x384", layers=4, width=384, patch=32, side=224, batch=32, precisions=("fp32",))


BASE = Case(
    name="ViT-B/32",
    layers=12,
    width=768,
    patch=32,
    side=224,
    batch=32,
    precisions=("fp32", "bf16"),
    compiled=(),
)


LARGE = Case(name="ViT-L/14-336", layers=24, width=1024, patch=14, side=336, batch=256, precisions=("bf16",))


TINY = Case(name="ViT 2x64", layers=2, width=64, patch=8, side=32, batch=4, precisions=("fp32", "bf16"), compiled=())


def make_clip(case: Case) -> Clip:
    """An open_clip model with random weights that keep features of ordinary size."""
    vision = TowerConfig(
        width=case.width,
        mlp_width=4 * case.width,
        layers=case.layers,
        heads=case.width // 64,
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


def encoder_of(clip: Clip, case: Case, device: torch.device, precision: str, *, compiled: bool) -> Encoder:
    """Ours, the projected tap, which is what open_clip's forward gives."""
    return Encoder(clip, tap="projected", precision=precision, batch_size=case.batch, compiled=compiled, device=device)


def fidelity(clip: Clip, case: Case, pixels: Tensor, precision: str) -> float:
    """Largest error of a feature of ours against open_clip's forward in fp32, relative to its length."""
    few = pixels[:4]
    with torch.inference_mode():
        expected = clip.module.visual(normalized(few.cpu()))
    ours = encoder_of(clip, case, pixels.device, precision, compiled=False).encode(pixels)[: len(few)].cpu()
    return float(((ours - expected).norm(dim=1) / expected.norm(dim=1)).max())
