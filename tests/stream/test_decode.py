from __future__ import annotations

import io
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from stream_samples import encoded, jpeg, noise

from geoloc_batch.errors import DecodeError
from geoloc_batch.stream import decode as decode_module
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.decode import decode_photo, fit, photo_pixels

SIDE = 56


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' processor, up to where it leaves uint8."""
    from transformers import CLIPImageProcessor

    def pixels(image: Any, side: int) -> torch.Tensor:
        processor = CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size=side, do_rescale=False, do_normalize=False
        )
        result: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return result

    return pixels


def by_pil(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def image_of(mode: str, height: int = 37, width: int = 53) -> Image.Image:
    channels = noise(height, width, 4)
    if mode in ("RGB", "CMYK", "RGBA"):
        return Image.frombytes(mode, (width, height), channels[:, :, : len(mode)].tobytes())
    if mode == "LA":
        return Image.frombytes("LA", (width, height), channels[:, :, :2].tobytes())
    return Image.fromarray(channels[:, :, :3]).convert(mode)


def test_real_photos_have_the_pixels_of_transformers(real_photos: list[Path], reference: Any) -> None:
    for path in real_photos:
        data = path.read_bytes()
        pixels = photo_pixels(data, 336)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 336, 336))
        assert torch.equal(pixels, reference(Image.open(path), 336)), path


def test_real_photos_are_decoded_by_the_fast_decoder(real_photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "opened", None)
    for path in real_photos:
        assert np.array_equal(decode_photo(path.read_bytes()), by_pil(path.read_bytes()))


def test_real_photos_are_at_most_two_levels_from_pils_bicubic(real_photos: list[Path]) -> None:
    side, drifts = 336, []
    for path in real_photos:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        scale = max(rgb.size) / min(rgb.size)
        width, height = (int(side * scale) if length == max(rgb.size) else side for length in rgb.size)
        left, top = (width - side) // 2, (height - side) // 2
        resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
        expected = np.asarray(resized.crop((left, top, left + side, top + side))).astype(int)
        difference = np.abs(photo_pixels(path.read_bytes(), side).permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 2, path
        assert (difference == 0).mean() >= 0.98, path
        drifts.append(difference.mean())
    assert np.mean(drifts) < 0.006


@settings(max_examples=120, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), side=st.integers(2, 99), seed=st.integers(0, 9))
def test_any_size_is_fitted_as_transformers_does(reference: Any, height: int, width: int, side: int, seed: int) -> None:
    rgb = noise(height, width, seed=seed)
    assert torch.equal(fit(rgb, side), reference(Image.fromarray(rgb), side))


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 300), (300, 1), (56, 56), (56, 57), (57, 56), (56, 400), (333, 57), (2, 3)]
)
def test_odd_sizes_are_fitted_as_transformers_does(reference: Any, height: int, width: int) -> None:
    rgb = noise(height, width)
    assert torch.equal(fit(rgb, SIDE), reference(Image.fromarray(rgb), SIDE))


def test_arrays_that_are_not_contiguous_or_writable_are_fitted_alike() -> None:
    rgb = noise(90, 70)
    turned = np.ascontiguousarray(rgb[::-1])[::-1]
    turned.flags.writeable = False
    assert torch.equal(fit(turned, SIDE), fit(rgb, SIDE))


CASES = {
    "png": [("L", {}), ("LA", {}), ("P", {}), ("RGB", {}), ("RGBA", {}), ("1", {})],
    "webp": [("RGB", {"lossless": True}), ("RGBA", {"lossless": True}), ("RGB", {"quality": 50})],
    "tiff": [("L", {}), ("P", {}), ("RGB", {"compression": "tiff_lzw"}), ("RGBA", {}), ("CMYK", {}), ("LAB", {})],
    "bmp": [("L", {}), ("P", {}), ("RGB", {}), ("1", {})],
    "gif": [("L", {}), ("P", {}), ("RGB", {})],
    "jpeg": [
        ("L", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"keep_rgb": True}),
        ("CMYK", {}),
    ],
    "avif": [("RGB", {}), ("RGBA", {})],
}


@pytest.mark.parametrize(
    ("kind", "mode", "options"), [(kind, mode, options) for kind, cases in CASES.items() for mode, options in cases]
)
def test_every_format_and_mode_gives_what_pil_converts_it_to(kind: str, mode: str, options: dict[str, Any]) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this PIL reads no avif")
    data = encoded(image_of("RGB" if mode == "LAB" else mode), kind, **options)
    if mode == "LAB":
        lab = Image.frombytes("LAB", (53, 37), noise(37, 53).tobytes())
        data = encoded(lab, kind, **options)
    pixels = decode_photo(data)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, by_pil(data))


def test_a_transparent_palette_is_converted_without_a_warning() -> None:
    data = encoded(image_of("P"), "png", transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = by_pil(data)
    assert np.array_equal(decode_photo(data), expected)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.array_equal(decode_photo(data), by_pil(data))
    assert np.abs(decode_photo(data).astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big-endian"])
def test_16_bit_gray_is_scaled_and_not_clipped(kind: str) -> None:
    deep = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(64, 48)
    if kind == "tiff big-endian":
        data = encoded(Image.frombytes("I;16B", (48, 64), deep.astype(">u2").tobytes()), "tiff")
    else:
        data = encoded(Image.fromarray(deep), kind)
    pixels = decode_photo(data)
    assert np.array_equal(pixels, np.repeat(np.round(deep / 257).astype(np.uint8)[:, :, None], 3, axis=2))


def test_orientation_is_applied_only_when_asked(real_photos: list[Path]) -> None:
    oriented = [path for path in real_photos if path.parent.name == "orientation"]
    if not oriented:
        pytest.skip("no photos with orientation")
    seen = set()
    for path in oriented:
        data = path.read_bytes()
        image = Image.open(path)
        seen.add(image.getexif().get(0x0112, 1))
        assert np.array_equal(decode_photo(data), np.asarray(image.convert("RGB")))
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(decode_photo(data, apply_orientation=True), expected)
        assert photo_pixels(data, SIDE, apply_orientation=True).shape == (3, SIDE, SIDE)
    assert len(seen) == 8


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_of_every_format_is_as_pil_turns_it(kind: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(image_of("RGB"), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_photo(data, apply_orientation=True), expected)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"this is a text called jpg", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0"]
)
def test_what_is_no_image_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_photo(data)
    assert not caught.value.retryable


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "png", "webp", "tiff", "bmp", "gif"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_truncated_photo_is_refused_whatever_its_format(kind: str, part: float) -> None:
    data = encoded(image_of("RGB", 200, 300), kind.split()[0], **({"progressive": True} if " " in kind else {}))
    with pytest.raises(DecodeError):
        decode_photo(data[: int(part * len(data))])


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7), length=st.integers(0, 10**9))
def test_a_damaged_jpeg_is_refused_exactly_when_pil_refuses_it(position: int, bit: int, length: int) -> None:
    data = bytearray(jpeg(60, 80, quality=40))
    data[position % len(data)] ^= 1 << bit
    damaged = bytes(data[: len(data) - length % 40])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = by_pil(damaged)
        except Exception:
            expected = None
    try:
        pixels = decode_photo(damaged)
    except DecodeError:
        pixels = None
    assert (pixels is None) == (expected is None)
    assert pixels is None or np.array_equal(pixels, expected)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("jpeg", "png", "webp", "tiff", "bmp", "gif"):
        data = encoded(image_of("RGB", 20, 30), kind)
        assert decode_photo(data, max_pixels=600).shape == (20, 30, 3)
        monkeypatch.setattr(decode_module, "rgb_pixels", None)
        monkeypatch.setattr(decode_module, "jpeg_pixels", None)
        with pytest.raises(DecodeError, match="30 x 20 has more pixels than --max-pixels 599"):
            decode_photo(data, max_pixels=599)
        monkeypatch.undo()


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(DecodeError, match="30000 x 30000 has more pixels than --max-pixels 180000000"):
        decode_photo(encoded(Image.new("1", (30_000, 30_000)), "png"))


def test_pils_own_limit_neither_fires_nor_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Beyond its limit PIL warns, beyond twice the limit it refuses.
    for limit in (500, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for kind in ("png", "webp", "gif", "tiff"):
            assert decode_photo(encoded(image_of("RGB", 20, 30), kind)).shape == (20, 30, 3)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_a_photo_that_is_too_long_and_thin_is_refused_clearly(reference: Any) -> None:
    thin = jpeg(1, 5000)
    with pytest.raises(DecodeError, match="5000 x 1 is too long and thin: resized it would be 1680000 x 336 pixels"):
        photo_pixels(thin, 336)
    with pytest.raises(DecodeError, match="too long and thin"):
        fit(noise(5000, 1), 336)
    assert torch.equal(photo_pixels(thin, 24), reference(Image.open(io.BytesIO(thin)), 24))


def test_an_exif_that_pil_warns_of_is_used_as_far_as_it_goes() -> None:
    # Five entries are announced, the orientation (6) is there, the second entry is cut.
    data = jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x0f\x01")
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(data)).getexif()
    upright = decode_photo(data)
    assert np.array_equal(decode_photo(data, apply_orientation=True), np.rot90(upright, -1))


def test_decoding_leaves_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    data = encoded(image_of("P"), "png", transparency=bytes(range(200)))
    threads = [threading.Thread(target=lambda: [decode_photo(data) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_a_budget_bounds_what_threads_hold_together_and_lets_a_large_one_run_alone() -> None:
    budget = MemoryBudget(100)
    together: list[int] = []

    def work(size: int) -> None:
        for _ in range(20):
            with budget.hold(size):
                together.append(budget.held)
                time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=(size,)) for size in (30, 45, 60, 250)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(together) == 80
    assert {held for held in together if held > 100} == {250}
    assert max(held for held in together if held <= 100) > 60
    assert (budget.held, budget.peak) == (0, 250)


def test_decoding_takes_its_bytes_from_the_budget_and_gives_them_back() -> None:
    for data, least in ((jpeg(100, 200), 3), (encoded(image_of("RGB", 100, 200), "png"), 8)):
        budget = MemoryBudget(1)
        photo_pixels(data, SIDE, budget=budget)
        assert budget.held == 0
        assert budget.peak >= least * 100 * 200
    with pytest.raises(DecodeError):
        photo_pixels(jpeg(100, 200)[:900], SIDE, budget=budget)
    assert budget.held == 0
