"""fp8: the arithmetic of its scales, on a CPU, which multiplies 8-bit numbers too, if slowly; and who is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import model_samples as samples
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from geoloc_batch.errors import ConfigError
from geoloc_batch.model import arithmetic, tower
from geoloc_batch.model.arithmetic import check_precision
from geoloc_batch.model.checkpoint import Normalization
from geoloc_batch.model.clip import load_clip
from geoloc_batch.model.encoder import Encoder, load_encoder
from geoloc_batch.model.fp8 import _SMALLEST_SCALE, FP8, LARGEST, RowScaledLinear, quantize_rows, try_product


def _is_lacking() -> str:
    """What this torch says of 8-bit products on a CPU; nothing where it has them."""
    try:
        try_product(torch.device("cpu"))
    except RuntimeError as error:
        return str(error)[-80:]
    return ""


needs_products = pytest.mark.skipif(
    bool(_is_lacking()), reason=f"torch {torch.__version__} has no 8-bit products by rows on a CPU: {_is_lacking()}"
)

# Relative to a feature's length, random weights; bf16 is within 2e-2.
FEATURE_TOLERANCE = 0.1


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 7),
    columns=st.sampled_from([1, 3, 16, 63]),
    exponent=st.integers(-18, 18),
)
def test_every_number_is_kept_to_a_sixteenth_or_to_the_smallest_step_of_its_row(
    seed: int, rows: int, columns: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, columns, generator=generator) ** 3 * 2.0**exponent
    quantized, scale = quantize_rows(value)
    assert (quantized.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (rows, 1))
    off = (quantized.float() * scale - value).abs()
    assert bool((off <= torch.maximum(value.abs() / 16, scale / 1024) * (1 + 1e-5)).all())
    # The largest of a row fills the range, so that nothing is wasted and nothing overflows.
    # But for a row whose scale would be smaller than the smallest.
    is_full = value.abs().amax(dim=1) >= LARGEST * _SMALLEST_SCALE
    assert quantized.float().abs().amax(dim=1)[is_full].tolist() == [LARGEST] * int(is_full.sum())


@needs_products
def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_spoils_its_own_row_alone() -> None:
    value = torch.ones(4, 16)
    value[0] = 0
    value[1, 3], value[2, 3] = math.nan, math.inf
    linear = RowScaledLinear(bf16_linear(16, 16))
    assert quantize_rows(value[:1])[0].float().tolist() == [[0.0] * 16]
    product = linear(value)
    assert product[0].equal(linear.bias)
    assert [bool(row.isfinite().all()) for row in product] == [True, False, False, True]


def bf16_linear(inner: int, outer: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(7)
    linear = nn.Linear(inner, outer)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear.to(torch.bfloat16).requires_grad_(False)


@needs_products
@pytest.mark.parametrize(("inner", "outer"), [(16, 48), (192, 64), (1024, 16)])
def test_a_product_is_that_of_the_rounded_numbers(inner: int, outer: int) -> None:
    linear = bf16_linear(inner, outer)
    token = torch.randn(2, 5, inner, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    product = RowScaledLinear(linear)(token)
    assert (product.dtype, product.shape) == (torch.bfloat16, (2, 5, outer))

    def rounded(value: torch.Tensor) -> torch.Tensor:
        quantized, scale = quantize_rows(value)
        return quantized.double() * scale.double()

    expected = rounded(token.flatten(0, 1)) @ rounded(linear.weight).T + linear.bias.double()
    # Rounding of the result to bf16, 8 bits.
    assert samples.difference(product.flatten(0, 1).double(), expected) < 2**-8
    exact = token.flatten(0, 1).double() @ linear.weight.double().T + linear.bias.double()
    assert 1e-3 < samples.difference(product.flatten(0, 1).double(), exact) < 0.06


def fp8_on_cpu(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> Encoder:
    monkeypatch.setattr("geoloc_batch.model.encoder.check_precision", lambda *_: None)
    return load_encoder("demo", batch_size=batch_size, device="cpu", precision="fp8", compile="off")


@needs_products
def test_an_encoder_in_fp8_keeps_patches_and_last_layer_in_bf16_and_stays_near_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = fp8_on_cpu(monkeypatch, 5)
    vit: Any = encoder.tower
    kinds = [{type(part) for part in layer.modules()} for layer in vit.layers]
    assert all(RowScaledLinear in kind and nn.Linear not in kind for kind in kinds[:-1])
    assert RowScaledLinear not in kinds[-1]
    assert vit.embed_patches.weight.dtype == torch.bfloat16
    pixels = samples.photos(5, 56)
    exact = load_encoder("demo", batch_size=5, device="cpu", precision="fp32").encode(pixels)
    feature = encoder.encode(pixels)
    assert feature.dtype == torch.float32
    assert 1e-3 < samples.difference(feature, exact) < FEATURE_TOLERANCE
    for place in range(5):
        others = samples.photos(5, 56, seed=place + 1)
        others[place] = pixels[3]
        assert torch.equal(encoder.encode(others)[place], feature[3])


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        ("cpu", (0, 0), "needs a CUDA device, this is cpu"),
        ("cuda", (8, 6), "capability 8.9, a chip has 8.6; pass bf16"),
    ],
)
def test_a_device_without_8_bit_products_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a chip")
    with pytest.raises(ConfigError, match=words):
        check_precision("fp8", torch.device(name))


def test_capability_8_9_and_later_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        tried: list[torch.device] = []
        monkeypatch.setattr(arithmetic, "try_product", tried.append)
        check_precision("fp8", torch.device("cuda"))
        assert tried == [torch.device("cuda")]


def test_a_device_that_lacks_products_by_rows_alone_is_refused_by_trying_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("Rowwise scaling is not currently supported on your device\nmore lines")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a chip")
    # The smallest product on the CPU in its place, by the same call as every layer's.
    monkeypatch.setattr(arithmetic, "try_product", lambda _: try_product(torch.device("cpu")))
    monkeypatch.setattr(torch, "_scaled_mm", lacking)
    with pytest.raises(ConfigError, match=r"does not run on a chip .*not currently supported on your device\); pass"):
        check_precision("fp8", torch.device("cuda"))


def test_towers_that_have_no_8_bit_form_are_refused() -> None:
    with pytest.raises(ConfigError, match="sides are multiples of 16, this encoder has one of 24 x 32; pass bf16"):
        RowScaledLinear(bf16_linear(24, 32))
    with pytest.raises(ConfigError, match="a net is of another kind"):
        tower.build_tower(nn.Identity(), Normalization(), tap="projected", precision="fp8", name="a net")


def test_the_bf16_tower_that_fp8_was_made_from_leaves_its_source_as_it_was() -> None:
    visual = load_clip("demo").module.visual
    before = copy.deepcopy(visual.state_dict())
    tower.build_tower(visual, Normalization(), tap="pooled", precision="fp8", name="demo")
    assert all(torch.equal(tensor, before[name]) for name, tensor in visual.state_dict().items())
