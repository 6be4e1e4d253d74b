"""The encoder's promises: one shape, rows that do not see each other, precision, determinism, plain errors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import model_samples as samples
import pytest
import torch

from geoloc_batch.errors import CheckpointError, ConfigError, HubError
from geoloc_batch.model import named
from geoloc_batch.model.arithmetic import auto_precision
from geoloc_batch.model.encoder import Encoder, load_encoder

# Largest relative error of a demo feature against fp32.
PRECISION_TOLERANCE = {"bf16": 2e-2, "fp16": 3e-3}


@pytest.fixture(scope="module")
def demo() -> Encoder:
    return load_encoder("demo", batch_size=7, device="cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_bit_equal_wherever_it_stands_and_whoever_its_neighbours_are(precision: Any, threads: int) -> None:
    encoder = load_encoder("demo", batch_size=7, device="cpu", precision=precision)
    pixels = samples.photos(7, 56)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = encoder.encode(pixels)
        for place in range(7):
            others = samples.photos(7, 56, seed=place + 1)
            others[place] = pixels[3]
            assert torch.equal(encoder.encode(others)[place], alone[3])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("encoder", "precision"),
    [("demo", "bf16"), ("demo", "fp16"), ("open_clip:RN50", "bf16")],
    ids=lambda value: value[-4:],
)
def test_low_precision_stays_near_fp32_and_gives_float32(encoder: str, precision: Any) -> None:
    exact = load_encoder(encoder, batch_size=1, device="cpu", tap="projected", precision="fp32")
    near = load_encoder(encoder, batch_size=1, device="cpu", tap="projected", precision=precision)
    pixels = samples.photos(1, exact.image_size)
    feature = near.encode(pixels)
    assert feature.dtype == torch.float32
    assert 1e-5 < samples.difference(feature, exact.encode(pixels)) < PRECISION_TOLERANCE[precision]


def test_low_precision_keeps_the_layer_norms_in_fp32() -> None:
    tower = load_encoder("demo", batch_size=1, device="cpu", precision="bf16").tower
    kinds = {
        (type(module).__name__, parameter.dtype)
        for module in tower.modules()
        for parameter in module.parameters(recurse=False)
    }
    assert kinds == {("PlainViT", torch.float32), ("_Norm", torch.float32), ("Linear", torch.bfloat16)}


# Relative to a feature's length: fused steps round in other places.
COMPILED_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_encoder_gives_the_same_features_and_rows_that_do_not_see_each_other(
    tmp_path: Path, precision: Any
) -> None:
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    folder = samples.save(samples.make_model(vision=vision, spread=1.0), tmp_path / "checkpoint")
    eager, compiled = (
        load_encoder(
            str(folder),
            batch_size=5,
            device="cpu",
            precision=precision,
            compile=mode,
            compile_cache=str(tmp_path / "graphs"),
        )
        for mode in ("off", "on")
    )
    assert (compiled.compiled, eager.compiled) == (True, False)
    pixels = samples.photos(5, 30)
    alone = compiled.encode(pixels)
    assert samples.difference(alone, eager.encode(pixels)) < COMPILED_TOLERANCE[precision]
    for place in range(5):
        others = samples.photos(5, 30, seed=place + 1)
        others[place] = pixels[3]
        assert torch.equal(compiled.encode(others)[place], alone[3])


@pytest.mark.parametrize(("precision", "batch_size"), [("fp32", 7), ("fp32", 1), ("bf16", 50)])
def test_one_graph_serves_ragged_shards_every_memory_layout_and_a_second_run(
    monkeypatch: pytest.MonkeyPatch, precision: Any, batch_size: int
) -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    torch._dynamo.reset()
    pixels = samples.photos(batch_size, 56)
    expected = load_encoder("demo", batch_size=batch_size, device="cpu", precision=precision).encode(pixels)
    padded = pixels.clone()
    padded[batch_size // 2 :] = 0
    for _ in range(2):
        encoder = load_encoder(
            "demo", batch_size=batch_size, device="cpu", precision=precision, compile="on", compile_cache="off"
        )
        # As decoders write them, as most programs hold them, and cut from something larger.
        for layout in (
            pixels.permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2),
            pixels,
            torch.cat([padded, pixels])[batch_size:],
            torch.cat([pixels, padded], dim=1)[:, :3],
        ):
            assert torch.equal(encoder.encode(layout), expected)
        kept = max(1, batch_size // 2)
        assert torch.equal(encoder.encode(padded)[:kept], encoder.encode(padded.clone())[:kept])
        for _ in range(3):
            # What a run does between batches: locating the features, in another mode of autograd.
            with torch.inference_mode():
                encoder.encode_text(torch.tensor([[1, 2]]))
            encoder.encode(padded)
    assert len(graphs) == 1


def test_a_callers_pixels_are_copied_before_encode_returns(demo: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    real = torch.Tensor.to

    def noted(tensor: torch.Tensor, *given: Any, **how: Any) -> torch.Tensor:
        copies.append((tuple(tensor.shape), how))
        return real(tensor, *given, **how)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    demo.encode(torch.zeros(7, 3, 56, 56, dtype=torch.uint8))
    # A pinned tensor that is copied without waiting could be filled anew before it was read.
    assert ((7, 3, 56, 56), {}) in copies
    assert not any(how.get("non_blocking") for _, how in copies)


def test_another_precision_of_a_loaded_encoder_equals_one_loaded_with_it() -> None:
    pixels = samples.photos(3, 56)
    half = load_encoder("demo", batch_size=3, device="cpu", precision="fp16")
    again = half.at_precision("bf16")
    expected = load_encoder("demo", batch_size=3, device="cpu", precision="bf16")
    assert (again.precision, again.fingerprint, half.precision) == ("bf16", half.fingerprint, "fp16")
    assert torch.equal(again.encode(pixels), expected.encode(pixels))
    assert not torch.equal(half.encode(pixels), expected.encode(pixels))


def test_features_are_raw_and_the_taps_differ() -> None:
    pixels = samples.photos(2, 56)
    pooled = load_encoder("demo", batch_size=2, device="cpu").encode(pixels)
    projected = load_encoder("demo", batch_size=2, device="cpu", tap="projected").encode(pixels)
    assert pooled.shape == (2, 192)
    assert projected.shape == (2, 128)
    assert not torch.allclose(pooled.norm(dim=1), torch.ones(2))
    assert not torch.allclose(projected.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(6, 3, 56, 56, dtype=torch.uint8),
        torch.zeros(7, 3, 56, 55, dtype=torch.uint8),
        torch.zeros(7, 3, 56, 56),
    ],
    ids=["short batch", "other side", "floats"],
)
def test_pixels_of_another_shape_or_dtype_are_refused(demo: Encoder, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes pixels of \[7, 3, 56, 56\] uint8, got"):
        demo.encode(pixels)


def test_the_demo_encoder_sees_what_stands_where(demo: Encoder) -> None:
    """The same colours, once above and once below, are further apart than two noisy views of one scene."""
    sky, ground = torch.tensor([120, 160, 220]), torch.tensor([110, 100, 60])
    scene = torch.cat([sky[:, None, None].expand(3, 28, 56), ground[:, None, None].expand(3, 28, 56)], dim=1)
    noise = torch.randint(-12, 13, (3, 3, 56, 56), generator=torch.Generator().manual_seed(0))
    views = torch.stack([scene, scene, scene.flip(1)]) + noise
    batch = torch.zeros(7, 3, 56, 56, dtype=torch.uint8)
    batch[:3] = views.clamp(0, 255).to(torch.uint8)
    feature = demo.encode(batch)
    assert (feature[0] - feature[2]).norm() > 5 * (feature[0] - feature[1]).norm()


def test_random_weights_of_a_named_architecture_come_from_a_fixed_seed() -> None:
    torch.manual_seed(1)
    first = load_encoder("open_clip:ViT-S-32-alt", batch_size=1, device="cpu")
    torch.manual_seed(2)
    second = load_encoder("open_clip:ViT-S-32-alt", batch_size=1, device="cpu")
    assert first.sha256 == second.sha256
    assert len(first.sha256) == 64
    assert torch.equal(first.encode(samples.photos(1, 224)), second.encode(samples.photos(1, 224)))


def test_a_named_architecture_reads_open_clips_own_file(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(3)
    model = open_clip.create_model("ViT-S-32-alt", precision="fp32").eval()
    file = tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    encoder = load_encoder(
        f"open_clip:ViT-S-32-alt:{file}", batch_size=2, device="cpu", tap="projected", precision="fp32"
    )
    pixels = samples.photos(2, 224)
    with torch.no_grad():
        expected = model.encode_image((pixels.float() / 255 - samples.MEAN) / samples.STD)
    assert samples.difference(encoder.encode(pixels), expected) < 1e-5
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load it"):
        load_encoder(f"open_clip:ViT-S-32-alt:{file}", device="cpu")


def test_text_and_photos_of_a_named_architecture_share_a_space() -> None:
    encoder = load_encoder("open_clip:ViT-S-32-alt", batch_size=1, device="cpu", tap="projected", precision="bf16")
    text = encoder.encode_text(["a photo of a street in Oslo", "Rome"])
    assert text.dtype == torch.float32
    assert text.shape == (2, encoder.dim)
    assert not torch.allclose(text[0], text[1], rtol=1e-2)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("open_clip:ViT-B-33", "did you mean ViT-B-32"),
        ("open_clip:ViT-B-32:nothing", "no file and no tag of ViT-B-32 .tags: .*openai"),
        ("open_clip:ViT-B-32:openai", "use open_clip:ViT-B-32-quickgelu:openai"),
        ("open_clip:RN50", "no class token .* pass --tap projected"),
        ("open_clip:ViT-B-16-SigLIP:webli", "resize_mode='squash'"),
    ],
)
def test_a_named_architecture_that_cannot_be_used_says_what_to_use(encoder: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_encoder(encoder, device="cpu")


def test_weights_that_cannot_be_downloaded_are_a_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"laion2b_s34b_b79k could not be downloaded .* pass open_clip:ViT-B-32:FILE"):
        named.load_named("open_clip:ViT-B-32:laion2b_s34b_b79k")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tap": "middle"}, "--tap must be one of pooled, projected, got 'middle'"),
        ({"precision": "fp7"}, "--precision must be one of auto, fp32, bf16, fp16, fp8, got 'fp7'"),
        ({"precision": "fp8", "device": "cpu"}, "--precision fp8 needs a CUDA device"),
        ({"compile": "maybe"}, "--compile must be one of"),
        ({"batch_size": -1}, "--batch-size must be auto .or 0. or at least 1, got -1"),
        ({"device": "cuda:99"}, "is not there"),
        ({"device": "abacus"}, "'abacus' is unknown"),
        ({"encoder": ""}, "--encoder must not be empty"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_encoder(**{"encoder": "demo"} | options)


def test_token_ids_and_texts_that_do_not_fit_are_refused(demo: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 92 tokens, the encoder takes 77"):
        demo.encode_text(["street " * 90])
    with pytest.raises(ValueError, match=r"must be \[N, 1..77\]"):
        demo.encode_text(torch.zeros(1, 78, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 49407, got -1 to 49408"):
        demo.encode_text(torch.tensor([[-1, 49408]]))
    small = load_encoder(str(samples.save(samples.make_model(), tmp_path / "c")), batch_size=1, device="cpu")
    with pytest.raises(CheckpointError, match="pass token ids instead of strings"):
        small.encode_text(["a street"])


def test_precision_is_chosen_by_the_processors_features_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, precision in (
        ({"amx_tile": True, "amx_bf16": True, "avx512_bf16": True}, "bf16"),
        ({"amx_tile": True, "amx_bf16": False, "avx512_bf16": True}, "fp32"),
        ({"avx512_bf16": True}, "fp32"),
        ({}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        encoder = load_encoder("demo", device="cpu")
        assert (encoder.precision, encoder.batch_size, encoder.compiled) == (precision, 32, False)
        assert encoder.summary().startswith(f"demo (ViT 4x192, patch 14, 56 px, pooled 192-d, {precision}), sha256 ")
        assert encoder.summary().endswith(", licence not stated")
    assert auto_precision(torch.device("cuda")) == "bf16"
