"""JPEGs through libjpeg-turbo: size, reduction, pixels.

Only 1/2, 1/4 and 1/8 are used of the reductions that libjpeg-turbo can do: for the others its inverse transforms are
slower than that of the full size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from simplejpeg import decode_jpeg, decode_jpeg_header

_MAGIC = b"\xff\xd8\xff"
_REDUCTIONS = (8, 4, 2)


def reduction_of(height: int, width: int, side: int, turn: int) -> int:
    """By how much a photo may be reduced: 8, 4, 2, or 1 where it is less than twice too large.

    Args:
        height: of the whole photo.
        width: of the whole photo.
        side: pixels that the shorter side must keep.
        turn: the EXIF orientation that will be applied, 1 for none.
    """
    for reduction in _REDUCTIONS:
        # Turned, an incomplete last row or column would come to stand first, where the resizing does not expect it.
        is_whole = turn == 1 or not (height % reduction or width % reduction)
        if min(height, width) >= reduction * side and is_whole:
            return reduction
    return 1


def jpeg_bytes(data: bytes, size: tuple[int, int], reduction: int, turn: int) -> int:
    """At most what decoding and turning hold at a time: the pixels, and of a progressive photo its coefficients.

    Args:
        data: the file's bytes.
        size: (H, W), as jpeg_size tells.
        reduction: 1, 2, 4 or 8.
        turn: the EXIF orientation that will be applied, 1 for none.
    """
    height, width = size
    num_reduced = -(-height // reduction) * -(-width // reduction)
    return num_reduced * (3 if turn == 1 else 6) + (6 * height * width if _is_progressive(data) else 0)


def _is_progressive(data: bytes) -> bool:
    """Whether a JPEG comes in several scans over all of it; True where that cannot be told.

    Source: ITU-T T.81, table B.1: SOF2, SOF6, SOF10 and SOF14 begin such frames.
    """
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker & 3 == 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that the fast decoder reads as PIL would; None for everything else."""
    if not data.startswith(_MAGIC):
        return None
    try:
        height, width, colorspace, _ = decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colorspace.upper() in ("CMYK", "YCCK") else (int(height), int(width))


def jpeg_pixels(data: bytes, size: tuple[int, int], reduction: int) -> npt.NDArray[np.uint8] | None:
    """Decode at 1 / reduction of the size.

    Returns:
        [H / reduction, W / reduction, 3] uint8, rounded up; None where the decoder complains of anything.
    """
    height, width = (-(-length // reduction) for length in size)
    try:
        pixels: npt.NDArray[np.uint8] = decode_jpeg(data, "RGB", strict=True, min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels
