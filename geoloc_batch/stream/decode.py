"""A photo's bytes -> RGB pixels, and the square that the encoder sees.

The pixels are those of transformers 5's CLIPImageProcessor, bit for bit: full decode, torch's antialiased bicubic on
uint8 with the shorter side brought to S, centre crop with floored offset. JPEGs go through libjpeg-turbo (simplejpeg,
equal to PIL's pixels and faster); what it does not read, or reads with a complaint, goes to PIL, whose word counts.

The fast mode differs in one thing: a JPEG at least twice too large is decoded at 1/2, 1/4 or 1/8 of its size, which
libjpeg-turbo does by smaller inverse transforms. Crop and scale are those of the whole photo.

Shape letters: H, W a photo's height and width, S the encoder's side, h, w those of a reduced decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geoloc_batch.errors import DecodeError
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.jpeg import jpeg_bytes, jpeg_pixels, jpeg_size, reduction_of
from geoloc_batch.stream.pillow import BYTES_PER_PIXEL, opened, orientation, rgb_pixels, turned

T = TypeVar("T")

MAX_PIXELS = StreamConfig().max_pixels


class _Decoded(NamedTuple):
    """A decoded photo, and what it is a reduction of."""

    rgb: npt.NDArray[np.uint8]
    """[h, w, 3], h = H / reduction and w = W / reduction, rounded up."""
    height: int
    width: int
    reduction: int = 1

    @classmethod
    def whole(cls, rgb: npt.NDArray[np.uint8]) -> _Decoded:
        """One that was decoded in full."""
        return cls(rgb, *rgb.shape[:2])


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
    return _decoded(data, lambda photo: photo.rgb, None, False, apply_orientation, max_pixels, budget)


def photo_pixels(
    data: bytes,
    side: int,
    *,
    fast: bool = False,
    apply_orientation: bool = False,
    max_pixels: int = MAX_PIXELS,
    budget: MemoryBudget | None = None,
) -> Tensor:
    """decode_photo and fit in one step, the budget held until the large array is gone.

    Args:
        data: the file's bytes.
        side: S.
        fast: decode JPEGs at the smallest of 1/2, 1/4 and 1/8 that leaves the shorter side at least S pixels. A photo
            less than twice too large, and every other format, has the same pixels with and without.
        apply_orientation: as decode_photo.
        max_pixels: as decode_photo, of the whole photo.
        budget: as decode_photo.

    Returns:
        [3, S, S] uint8, channels last in memory.

    Raises:
        DecodeError: as decode_photo and fit.
    """
    return _decoded(
        data, lambda photo: _fit(photo, side, max_pixels), side, fast, apply_orientation, max_pixels, budget
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
    return _fit(_Decoded.whole(rgb_HW3), side, max_pixels)


def _fit(photo: _Decoded, side: int, max_pixels: int) -> Tensor:
    """See fit."""
    height, width = photo.rgb.shape[:2]
    new_height, new_width = _resized(photo.height, photo.width, side, max_pixels)
    pixels = torch.from_numpy(np.require(photo.rgb, requirements=["C", "W"])).permute(2, 0, 1)
    if (new_height, new_width) != (height, width):
        # Telling the batch's stride keeps the result channels last, and saves a pass over it.
        batch = pixels.as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))
        if photo.reduction == 1:
            resized = torch.nn.functional.interpolate(batch, (new_height, new_width), mode="bicubic", antialias=True)
        else:
            scale = _scale(new_height, photo.height, photo), _scale(new_width, photo.width, photo)
            resized = torch.nn.functional.interpolate(batch, scale_factor=scale, mode="bicubic", antialias=True)
        pixels = resized[0]
    top, left = (new_height - side) // 2, (new_width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def _scale(new: int, old: int, photo: _Decoded) -> float:
    """From reduced pixels to new ones, `old` being the whole photo's.

    The last reduced pixel may stand for fewer than `reduction` whole ones: stretching h x w to the new size instead
    would move everything, by most of a pixel at the far border. A hair more, so that rounding down never loses a row.
    """
    return new * photo.reduction / old * (1 + 1e-9)


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
    finish: Callable[[_Decoded], T],
    side: int | None,
    fast: bool,
    apply_orientation: bool,
    max_pixels: int,
    budget: MemoryBudget | None,
) -> T:
    """Decode within the budget and hand the pixels to `finish`, which may need memory to resize to `side`."""
    if not data:
        raise DecodeError("the file is empty")
    size = jpeg_size(data)
    if size is not None:
        turn = _jpeg_orientation(data) if apply_orientation else 1
        reduction = reduction_of(*size, side, turn) if fast and side is not None else 1
        with _hold(budget, size, jpeg_bytes(data, size, reduction, turn), reduction, side, max_pixels):
            rgb = jpeg_pixels(data, size, reduction)
            if rgb is not None:
                height, width = size if turn < 5 else size[::-1]
                return finish(_Decoded(turned(rgb, turn), height, width, reduction))
    with opened(data) as image:
        width, height = image.size
    with _hold(budget, (height, width), height * width * BYTES_PER_PIXEL, 1, side, max_pixels):
        with opened(data) as image:
            rgb = rgb_pixels(image)
            # Asked last: some formats tell it behind their pixels.
            turn = orientation(image) if apply_orientation else 1
        return finish(_Decoded.whole(turned(rgb, turn)))


def _hold(
    budget: MemoryBudget | None,
    size: tuple[int, int],
    num_bytes: int,
    reduction: int,
    side: int | None,
    max_pixels: int,
) -> AbstractContextManager[None]:
    """Refuse what is too large, and take what decoding (`num_bytes`) and resizing will need from the budget."""
    height, width = size
    if height * width > max_pixels:
        raise DecodeError(f"{width} x {height} has more pixels than --max-pixels {max_pixels}")
    if side is not None:
        new_height, new_width = _resized(height, width, side, max_pixels)
        # The rows are resized first, with four bytes a pixel, then the columns.
        num_bytes += 4 * max(height * new_width, new_height * width) // reduction + 4 * new_height * new_width
    return budget.hold(num_bytes) if budget is not None else nullcontext()


def _jpeg_orientation(data: bytes) -> int:
    try:
        with opened(data) as image:
            return orientation(image)
    except DecodeError:
        # The pixels are there already, what PIL has against the header does not count.
        return 1
