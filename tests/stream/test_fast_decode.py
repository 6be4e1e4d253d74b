"""The fast mode: what it changes, by how much, and what it leaves alone."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from stream_samples import encoded, jpeg, unit_of, write_tar

from geoloc_batch.errors import DecodeError
from geoloc_batch.stream import decode as decode_module
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import photo_pixels
from geoloc_batch.stream.jpeg import jpeg_bytes, reduction_of

SIDE = 56

# By the reduction: levels of 255 on average, and decibels of the peak signal-to-noise ratio.
TOLERANCES = {2: (3.0, 34.0), 4: (3.0, 34.0), 8: (4.0, 32.0)}


@cache
def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Edges, areas and fine detail, as photos have them; 1/f noise."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (3, 9, 27, 81, 243):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / cells**0.7
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def drift(data: bytes, side: int, **options: Any) -> tuple[float, float]:
    """Mean absolute difference between fast and exact pixels, and the peak signal-to-noise ratio in decibels."""
    fast, exact = (photo_pixels(data, side, fast=fast, **options).double() for fast in (True, False))
    assert fast.shape == exact.shape == (3, side, side)
    difference = fast - exact
    noise = float((difference**2).mean())
    return float(difference.abs().mean()), 10 * np.log10(255**2 / max(noise, 1e-9))


def assert_near(data: bytes, side: int, reduction: int, **options: Any) -> None:
    mean, decibels = drift(data, side, **options)
    max_mean, min_decibels = TOLERANCES[reduction]
    assert mean <= max_mean
    assert decibels >= min_decibels


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much each photo was reduced."""
    seen: list[int] = []

    def noted(data: bytes, size: tuple[int, int], reduction: int) -> Any:
        seen.append(reduction)
        return jpeg_pixels(data, size, reduction)

    jpeg_pixels = decode_module.jpeg_pixels
    monkeypatch.setattr(decode_module, "jpeg_pixels", noted)
    return seen


@pytest.mark.parametrize(("shorter", "reduction"), [(112, 2), (223, 2), (224, 4), (447, 4), (448, 8), (1000, 8)])
@pytest.mark.parametrize("is_tall", [False, True])
def test_a_photo_is_reduced_as_far_as_it_stays_large_enough_and_looks_the_same(
    shorter: int, reduction: int, is_tall: bool, reductions: list[int]
) -> None:
    longer = shorter * 4 // 3 + 3
    size = (longer, shorter) if is_tall else (shorter, longer)
    assert_near(encoded(scene(*size), quality=92), SIDE, reduction)
    assert reductions == [reduction, 1]


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 111), width=st.integers(1, 700), is_tall=st.booleans(), quality=st.sampled_from([30, 75, 95])
)
def test_a_photo_less_than_twice_too_large_has_the_exact_pixels(
    height: int, width: int, is_tall: bool, quality: int
) -> None:
    data = jpeg(width, height, quality=quality) if is_tall else jpeg(height, width, quality=quality)
    assert torch.equal(photo_pixels(data, SIDE, fast=True), photo_pixels(data, SIDE))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(64, 400), width=st.integers(64, 400), seed=st.integers(0, 3))
def test_no_odd_size_moves_or_stretches_the_photo(height: int, width: int, seed: int) -> None:
    # A ramp tells where each pixel comes from: one pixel of the result off is 255 / 32 levels.
    side = 32
    ramp = np.linspace(0, 255, width if seed % 2 else height)
    plane = np.broadcast_to(ramp if seed % 2 else ramp[:, None], (height, width))
    photo = Image.fromarray(np.repeat(plane.round().astype(np.uint8)[:, :, None], 3, axis=2))
    data = encoded(photo, quality=98)
    fast, exact = (photo_pixels(data, side, fast=fast).double() for fast in (True, False))
    # The outermost rows and columns lack neighbours on one side, so that their filters differ.
    inner = (fast - exact)[:, 1:-1, 1:-1]
    assert abs(float(inner.mean())) < 0.8
    assert float(inner.abs().max()) < 2.5


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"keep_rgb": True}])
@pytest.mark.parametrize("shorter", [130, 251, 460])
def test_every_kind_of_jpeg_is_reduced_alike(options: dict[str, Any], shorter: int, reductions: list[int]) -> None:
    assert_near(encoded(scene(shorter, 555), quality=92, **options), SIDE, reduction_of(shorter, 555, SIDE, 1))
    assert reductions[0] > 1


def test_gray_jpegs_are_reduced_and_stay_gray(reductions: list[int]) -> None:
    data = encoded(scene(301, 260).convert("L"), quality=92)
    assert_near(data, SIDE, 4)
    red, green, blue = photo_pixels(data, SIDE, fast=True)
    assert torch.equal(red, green)
    assert torch.equal(green, blue)
    assert reductions[0] == 4


@pytest.mark.parametrize(
    ("kind", "mode"), [("jpeg", "CMYK"), ("png", "RGB"), ("webp", "RGB"), ("tiff", "RGB"), ("png", "P")]
)
def test_what_the_fast_decoder_does_not_read_has_the_exact_pixels(kind: str, mode: str) -> None:
    data = encoded(scene(300, 400).convert(mode), kind)
    assert torch.equal(photo_pixels(data, SIDE, fast=True), photo_pixels(data, SIDE))


@pytest.mark.parametrize("size", [(448, 600), (453, 460)])
@pytest.mark.parametrize("value", range(1, 9))
def test_a_reduced_photo_is_turned_as_its_exif_says(size: tuple[int, int], value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    photo = scene(*size)
    assert_near(encoded(photo, quality=92, exif=exif), SIDE, 8, apply_orientation=True)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(photo, "png", exif=exif))))
    pixels = photo_pixels(encoded(photo, quality=92, exif=exif), SIDE, fast=True, apply_orientation=True)
    expected = photo_pixels(encoded(upright, "png"), SIDE)
    assert float((pixels.double() - expected.double()).abs().mean()) < 6


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.99])
def test_a_truncated_jpeg_gives_the_same_error_as_in_the_exact_mode(options: dict[str, Any], part: float) -> None:
    data = encoded(scene(300, 400), quality=90, **options)
    cut = data[: int(part * len(data))]
    messages = []
    for fast in (False, True):
        with pytest.raises(DecodeError) as caught:
            photo_pixels(cut, SIDE, fast=fast)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_damaged_jpeg_is_refused_in_both_modes_or_in_none(position: int, bit: int) -> None:
    data = bytearray(DAMAGEABLE)
    data[position % len(data)] ^= 1 << bit
    outcomes = []
    for fast in (False, True):
        try:
            outcomes.append(tuple(photo_pixels(bytes(data), SIDE, fast=fast).shape))
        except DecodeError as error:
            outcomes.append((str(error),))
    assert outcomes[0] == outcomes[1]


DAMAGEABLE = jpeg(130, 160, quality=40)


def test_limits_hold_for_the_whole_photo() -> None:
    data = encoded(scene(300, 400), quality=50)
    with pytest.raises(DecodeError, match="400 x 300 has more pixels than --max-pixels 119999"):
        photo_pixels(data, SIDE, fast=True, max_pixels=119_999)


def test_a_reduced_photo_takes_less_from_the_budget() -> None:
    data = encoded(scene(448, 600), quality=50)
    peaks = []
    for fast in (False, True):
        budget = MemoryBudget(1 << 30)
        photo_pixels(data, SIDE, fast=fast, budget=budget)
        peaks.append(budget.peak)
    assert peaks[0] >= 3 * 448 * 600
    assert peaks[1] < peaks[0] / 3


def test_real_photos_drift_within_bounds(real_photos: list[Path]) -> None:
    drifts = []
    for path in real_photos:
        with Image.open(path) as photo:
            reduction = reduction_of(photo.height, photo.width, 224, 1)
        if reduction > 1:
            drifts.append(drift(path.read_bytes(), 224))
        else:
            data = path.read_bytes()
            assert torch.equal(photo_pixels(data, 224, fast=True), photo_pixels(data, 224))
    means, decibels = zip(*drifts, strict=True)
    # The worst have fine gravel and are 2.01 times too large, so that nothing is left to smooth.
    assert np.mean(means) < 3.5
    assert max(means) < 6
    assert min(decibels) > 29


def test_large_photos_drift_within_bounds(real_photos: list[Path]) -> None:
    """2 and 12 megapixels, for the encoder that the published heads use."""
    source = next(path for path in real_photos if path.parent.name == "berlin")
    for size, max_mean, min_decibels in (
        ((1632, 1224), 1.0, 44.0),
        ((4000, 3000), 2.7, 35.0),
        ((4003, 3001), 2.7, 35.0),
    ):
        data = encoded(Image.open(source).resize(size, Image.Resampling.LANCZOS), quality=90)
        mean, decibels = drift(data, 336)
        assert mean < max_mean, size
        assert decibels > min_decibels, size


def test_the_stream_decodes_as_its_config_says(tmp_path: Path) -> None:
    data = encoded(scene(300, 400), quality=92)
    unit = unit_of(write_tar(tmp_path / "a.tar", [("a.jpg", data)]))
    for fast in (False, True):
        with BatchStream([unit], side=SIDE, batch_size=1, config=StreamConfig(fast_decode=fast)) as stream:
            (batch,) = [item for item in stream if isinstance(item, Batch)]
            assert torch.equal(batch.pixels[0], photo_pixels(data, SIDE, fast=fast))
    assert not torch.equal(photo_pixels(data, SIDE, fast=True), photo_pixels(data, SIDE))


@pytest.mark.parametrize(
    ("options", "is_progressive"), [({}, False), ({"progressive": True}, True), ({"exif": b"Exif\0\0\xff\xc2"}, False)]
)
def test_a_progressive_jpeg_is_known_by_its_frame_alone(options: dict[str, Any], is_progressive: bool) -> None:
    # A progressive one holds all its coefficients, 6 bytes a pixel, until the last scan.
    data = encoded(scene(80, 100), quality=95, **options)
    assert jpeg_bytes(data, (80, 100), 1, 1) == 80 * 100 * (9 if is_progressive else 3)
    assert jpeg_bytes(data, (81, 99), 8, 6) == 11 * 13 * 6 + (6 * 81 * 99 if is_progressive else 0)
    assert jpeg_bytes(data[:10], (80, 100), 1, 1) == 80 * 100 * 9
