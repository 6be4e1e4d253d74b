"""A photo's bytes -> RGB pixels, and the square that the encoder sees.

The pixels are those of transformers 5's CLIPImageProcessor, bit for bit: full decode, torch's antialiased bicubic on
uint8 with the shorter side brought to S, centre crop with floored offset. JPEGs go through libjpeg-turbo (simplejpeg,
equal to PIL's pixels and faster); what it does not read, or reads with a complaint, goes to PIL, whose word counts.

Shape letters: H, W a photo's height and width, S the encoder's side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor

from geoloc_batch.errors import DecodeError
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.pillow import BYTES_PER_PIXEL, opened, orientation, rgb_pixels, turned

T = TypeVar("T")

MAX_PIXELS = StreamConfig().max_pixels

_JPEG_MAGIC = b"\xff\xd8\xff"
_PROGRESSIVE = b"\xff\xc2"


def decode_photo(
    data: bytes,
    *,
    apply_orientation: bool = False,
    max_pixels: int = MAX_PIXELS,
    budget: MemoryBudget | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode a photo.

    Args:
        data: the file's bytes: JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF; the first frame of an animation.
        apply_orientation: turn it as its EXIF says.
        max_pixels: more are refused before anything is decoded.
        budget: what decoding threads share; held while this one decodes.

    Returns:
        [H, W, 3] uint8 RGB, as PIL's convert("RGB") gives it; 16-bit gray is scaled to 8 bits.

    Raises:
        DecodeError: it is no image, or damaged, or too large.
    """
    return _decoded(data, lambda rgb: rgb, None, apply_orientation, max_pixels, budget)


def photo_pixels(
    data: bytes,
    side: int,
    *,
    apply_orientation: bool = False,
    max_pixels: int = MAX_PIXELS,
    budget: MemoryBudget | None = None,
) -> Tensor:
    """decode_photo and fit in one step, the budget held until the large array is gone.

    Returns:
        [3, S, S] uint8, channels last in memory.

    Raises:
        DecodeError: as decode_photo and fit.
    """
    return _decoded(
        data, lambda rgb: fit(rgb, side, max_pixels=max_pixels), side, apply_orientation, max_pixels, budget
    )


def fit(rgb_HW3: npt.NDArray[np.uint8], side: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Bring the shorter side to `side` and cut the centre out.

    Args:
        rgb_HW3: [H, W, 3] uint8, any size and aspect.
        side: S, at least 2.
        max_pixels: a photo so long and thin that it would have more after resizing is refused.

    Returns:
        [3, S, S] uint8, a view whose channels are last in memory: the resizing kernel works in that order, and a copy
        into another costs 4 % of a photo's whole time.

    Raises:
        DecodeError: the resized photo would be too large.
    """
    height, width = rgb_HW3.shape[:2]
    new_height, new_width = _resized(height, width, side, max_pixels)
    pixels = torch.from_numpy(np.require(rgb_HW3, requirements=["C", "W"])).permute(2, 0, 1)
    if (new_height, new_width) != (height, width):
        # Telling the batch's stride keeps the result channels last, and saves a pass over it.
        batch = pixels.as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))
        resized = torch.nn.functional.interpolate(batch, (new_height, new_width), mode="bicubic", antialias=True)
        pixels = resized[0]
    top, left = (new_height - side) // 2, (new_width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def _resized(height: int, width: int, side: int, max_pixels: int) -> tuple[int, int]:
    """Height and width after resizing, the longer side rounded down."""
    longer = int(side * max(height, width) / min(height, width))
    if side * longer > max_pixels:
        raise DecodeError(
            f"{width} x {height} is too long and thin: resized it would be {longer} x {side} pixels, "
            f"more than --max-pixels {max_pixels}"
        )
    return (side, longer) if height <= width else (longer, side)


def _decoded(
    data: bytes,
    finish: Callable[[npt.NDArray[np.uint8]], T],
    side: int | None,
    apply_orientation: bool,
    max_pixels: int,
    budget: MemoryBudget | None,
) -> T:
    """Decode within the budget and hand the pixels to `finish`, which may need memory to resize to `side`."""
    if not data:
        raise DecodeError("the file is empty")
    size = _jpeg_size(data)
    if size is not None:
        bytes_per_pixel = (9 if _PROGRESSIVE in data else 3) + (3 if apply_orientation else 0)
        with _hold(budget, *size, bytes_per_pixel, side, max_pixels):
            rgb = _jpeg_pixels(data)
            if rgb is not None:
                return finish(turned(rgb, _jpeg_orientation(data)) if apply_orientation else rgb)
    with opened(data) as image:
        width, height = image.size
    with _hold(budget, height, width, BYTES_PER_PIXEL, side, max_pixels):
        with opened(data) as image:
            rgb = rgb_pixels(image)
            # Asked last: some formats tell it behind their pixels.
            turn = orientation(image) if apply_orientation else 1
        return finish(turned(rgb, turn))


def _hold(
    budget: MemoryBudget | None, height: int, width: int, bytes_per_pixel: int, side: int | None, max_pixels: int
) -> AbstractContextManager[None]:
    """Refuse what is too large, and take what decoding and resizing will need from the budget."""
    if height * width > max_pixels:
        raise DecodeError(f"{width} x {height} has more pixels than --max-pixels {max_pixels}")
    num_bytes = height * width * bytes_per_pixel
    if side is not None:
        new_height, new_width = _resized(height, width, side, max_pixels)
        # The rows are resized first, with four bytes a pixel, then the columns.
        num_bytes += 4 * max(height * new_width, new_height * width) + 4 * new_height * new_width
    return budget.hold(num_bytes) if budget is not None else nullcontext()


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that the fast decoder reads as PIL would; None for everything else."""
    if not data.startswith(_JPEG_MAGIC):
        return None
    try:
        height, width, colorspace, _ = decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colorspace.upper() in ("CMYK", "YCCK") else (int(height), int(width))


def _jpeg_pixels(data: bytes) -> npt.NDArray[np.uint8] | None:
    try:
        pixels: npt.NDArray[np.uint8] = decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return pixels


def _jpeg_orientation(data: bytes) -> int:
    try:
        with opened(data) as image:
            return orientation(image)
    except DecodeError:
        # The pixels are there already, what PIL has against the header does not count.
        return 1
