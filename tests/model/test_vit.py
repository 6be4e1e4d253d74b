"""Our own image tower against transformers and against open_clip's forward, which is its definition."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import model_samples as samples
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from geoloc_batch.model.activations import ACTIVATIONS
from geoloc_batch.model.checkpoint import Normalization
from geoloc_batch.model.clip import load_clip
from geoloc_batch.model.encoder import Encoder, load_encoder
from geoloc_batch.model.tower import OpenClipTower, build_tower, is_plain_vit
from geoloc_batch.model.vit import PlainViT

# Relative to a feature's length, in fp32: the bar of the project is 1e-5.
TOLERANCE = 1e-5
CPU = torch.device("cpu")
TINY_TEXT = {"vocab_size": 64, "width": 16, "heads": 1, "layers": 1}


def encode_both(folder: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled, projected) by our tower, in fp32."""
    clip = load_clip(str(folder))
    pooled, projected = (
        Encoder(clip, tap=tap, precision="fp32", batch_size=len(pixels), compiled=False, device=CPU)
        for tap in ("pooled", "projected")
    )
    assert type(pooled.tower) is type(projected.tower) is PlainViT
    return pooled.encode(pixels), projected.encode(pixels)


def check(folder: Path, model: Any) -> None:
    pixels = samples.photos(3, model.config.vision_config.image_size)
    for ours, theirs in zip(encode_both(folder, pixels), samples.reference(model, pixels), strict=True):
        assert samples.difference(ours, theirs) < TOLERANCE


@st.composite
def vision_parts(draw: st.DrawFn) -> dict[str, Any]:
    heads, patch = draw(st.integers(1, 5)), draw(st.integers(1, 17))
    return {
        "hidden_size": heads * draw(st.integers(1, 33)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 130)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "patch_size": patch,
        # Up to 5 patches a side, and a rest that fills none.
        "image_size": draw(st.integers(patch, 6 * patch - 1)),
        "hidden_act": draw(st.sampled_from(["gelu", "quick_gelu", "gelu_new", "relu", "silu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.05])),
    }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vision=vision_parts(), seed=st.integers(0, 2**16))
def test_features_of_every_size_equal_transformers(
    tmp_path_factory: pytest.TempPathFactory, vision: dict[str, Any], seed: int
) -> None:
    # Of a width of 1 or 2 a layer norm leaves nothing but its bias or a sign: no relative error means anything there.
    vision["hidden_size"] *= 1 + 2 * (vision["hidden_size"] // vision["num_attention_heads"] < 3)
    model = samples.make_model(vision=vision, seed=seed)
    check(samples.save(model, tmp_path_factory.mktemp("checkpoint")), model)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_equals_transformers(tmp_path: Path, name: str) -> None:
    model = samples.make_model(vision={"hidden_act": name}, text={"hidden_act": name})
    folder = samples.save(model, tmp_path / "checkpoint")
    check(folder, model)
    ids = torch.randint(0, 99, (2, 13), generator=torch.Generator().manual_seed(1))
    text = load_encoder(str(folder), batch_size=1, device="cpu", precision="fp32").encode_text(ids)
    assert samples.difference(text, samples.reference_text(model, ids)) < TOLERANCE


def test_no_activation_of_transformers_without_weights_is_missing() -> None:
    from transformers.activations import ACT2CLS

    assert set(ACT2CLS) - set(ACTIVATIONS) <= {"prelu", "xielu"}


def open_clip_model(**vision: Any) -> Any:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 7, "image_size": 30} | vision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.CLIP(
            embed_dim=20,
            vision_cfg=open_clip.CLIPVisionCfg(**vision),
            text_cfg=open_clip.CLIPTextCfg(**TINY_TEXT),
            quick_gelu=vision.pop("quick_gelu", False),
        )
    for name, parameter in model.visual.named_parameters():
        # Biases and norms that are 0 and 1 would hide one that was forgotten.
        if parameter.ndim == 1 and not name.endswith("gamma"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False).visual


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"ls_init_value": 0.3},
        {"no_ln_pre": True, "final_ln_after_pool": True},
        {"act_kwargs": {"approximate": "tanh"}},
        {"pos_embed_type": "sin_cos_2d", "image_size": 28},
        {"norm_kwargs": {"eps": 0.02}, "patch_dropout": 0.5},
        {"layers": 1, "patch_size": 30},
        {"output_tokens": True},
    ],
    ids=lambda vision: ", ".join(vision) or "as it is",
)
@pytest.mark.parametrize("tap", ["pooled", "projected"])
def test_the_rewritten_tower_equals_open_clips_forward(vision: dict[str, Any], tap: str) -> None:
    visual = open_clip_model(**vision)
    side = vision.get("image_size", 30)
    # Another mean and deviation for each channel: a swapped channel would show.
    normalization = Normalization(mean=(0.5, 0.1, 0.3), std=(0.2, 0.3, 0.5))
    tower = build_tower(visual, normalization, tap=tap, precision="fp32", name="it")
    assert type(tower) is PlainViT
    pixels = samples.photos(4, side)
    mean, std = (torch.tensor(part)[:, None, None] for part in (normalization.mean, normalization.std))
    if tap == "pooled":
        visual.proj = None
    expected = visual((pixels / 255 - mean) / std)
    expected = expected[0] if isinstance(expected, tuple) else expected
    with torch.inference_mode():
        feature = tower(pixels.permute(0, 2, 3, 1))
    assert feature.shape == (4, tower.dim)
    assert samples.difference(feature, expected) < TOLERANCE


def test_a_plain_vit_never_runs_open_clips_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("open_clip's forward ran")

    folder = samples.save(samples.make_model(), tmp_path / "checkpoint")
    monkeypatch.setattr(VisionTransformer, "forward", refuse)
    monkeypatch.setattr(ResidualAttentionBlock, "forward", refuse)
    for name in ("demo", str(folder)):
        for precision in ("fp32", "bf16"):
            encoder = load_encoder(name, batch_size=2, device="cpu", precision=precision)
            assert type(encoder.tower) is PlainViT
            assert encoder.encode(samples.photos(2, encoder.image_size)).isfinite().all()
            ours = {type(module).__module__ for module in encoder.tower.modules()}
            assert not [name for name in ours if name.startswith("open_clip")]


@pytest.mark.parametrize(
    "vision",
    [
        {"pool_type": "avg"},
        {"attentional_pool": True, "attn_pooler_heads": 4},
        {"block_type": "custom", "scale_attn": True},
        {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32},
    ],
    ids=["mean of the tokens", "attention pool", "other layers", "ResNet"],
)
def test_other_towers_keep_open_clips_forward(vision: dict[str, Any]) -> None:
    visual = open_clip_model(**vision)
    assert not is_plain_vit(visual)
    tower = build_tower(visual, Normalization(), tap="projected", precision="fp32", name="it")
    assert type(tower) is OpenClipTower
    pixels = samples.photos(2, vision.get("image_size", 30))
    expected = visual((pixels.float() / 255 - samples.MEAN) / samples.STD)
    with torch.inference_mode():
        assert samples.difference(tower(pixels.permute(0, 2, 3, 1)), expected) < TOLERANCE


def test_the_last_layer_computes_its_mlp_and_queries_for_one_token() -> None:
    tower = load_encoder("demo", batch_size=2, device="cpu", precision="fp32").tower
    rows: list[tuple[int, int]] = []
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda made, given, out: rows.append((made.out_features, given[0].shape[1])))
    with torch.inference_mode():
        tower(samples.photos(2, 56).permute(0, 2, 3, 1))
    layer = [(576, 17), (192, 17), (768, 17), (192, 17)]
    assert rows == [(192, 16), *layer * 3, (192, 1), (384, 17), (192, 1), (768, 1), (192, 1)]


def test_patches_are_padded_to_a_multiple_of_8_and_centred() -> None:
    tower = build_tower(
        open_clip_model(patch_size=14, image_size=28), Normalization(), tap="pooled", precision="bf16", name="it"
    )
    assert isinstance(tower, PlainViT)
    assert tower.embed_patches.in_features == 592
    assert not tower.embed_patches.weight[:, 588:].any()
    patches = tower._patches(torch.arange(256, dtype=torch.uint8).repeat(21)[: 28 * 28 * 3].view(1, 28, 28, 3))
    assert (patches.min(), patches.max(), patches.dtype) == (-128, 127, torch.bfloat16)
    assert patches[0, 0, :4].tolist() == [-128, -127, -126, -125]


def test_the_weights_of_open_clip_are_left_as_they_are(tmp_path: Path) -> None:
    clip = load_clip(str(samples.save(samples.make_model(), tmp_path / "checkpoint")))
    before = {name: tensor.clone() for name, tensor in clip.module.state_dict().items()}
    for tap, precision in (("pooled", "bf16"), ("projected", "fp32"), ("pooled", "fp32")):
        Encoder(clip, tap=tap, precision=precision, batch_size=2, compiled=False, device=CPU).encode(
            samples.photos(2, 30)
        )
    after = clip.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Relative to a feature's length, at 6 layers x 64: 0.0038 and 0.00048 as it is, 0.0062 and 0.00076 with a sum that is
# rounded after each layer.
@pytest.mark.parametrize(("precision", "largest"), [("bf16", 0.005), ("fp16", 0.0006)])
def test_low_precision_sums_the_layers_in_fp32(tmp_path: Path, precision: Any, largest: float) -> None:
    vision = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 6}
    folder = samples.save(samples.make_model(vision=vision, spread=1.5), tmp_path / "checkpoint")
    pixels = samples.photos(16, 30)
    exact, near = (
        load_encoder(str(folder), batch_size=16, device="cpu", precision=name).encode(pixels)
        for name in ("fp32", precision)
    )
    difference = samples.difference(near, exact)
    assert largest / 10 < difference < largest
