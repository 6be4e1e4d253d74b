"""Photos through PIL: what the fast JPEG decoder does not read, and the EXIF orientation."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from geoloc_batch.errors import DecodeError

Image.init()
FORMATS = tuple(
    name
    for name in ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM"]
    if name in Image.OPEN
)
"""Formats that are tried, whatever the member's extension says. PIL's others may start programs (EPS) or need fonts."""

BYTES_PER_PIXEL = 16
"""At most what PIL and numpy hold at a time: the mode's own pixels, the RGB ones (4 bytes each) and two copies."""

_ORIENTATION_TAG = 0x0112
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class _PillowSettings:
    """Lifts PIL's own pixel limit and silences its warnings while any thread decodes.

    Both are settings of the whole process, so they are put back when the last thread leaves. The limit that counts
    here is max_pixels, checked before anything is decoded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._limit: int | None = None
        self._filters: warnings.catch_warnings[None] | None = None

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    assert self._filters is not None
                    self._filters.__exit__(None, None, None)
                    Image.MAX_IMAGE_PIXELS = self._limit


_settings = _PillowSettings()


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open a photo; its pixels are not decoded yet.

    Raises:
        DecodeError: it is no image of a known format, or what is done with it in the block fails.
    """
    with _settings.lifted():
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                yield image
        except (DecodeError, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise DecodeError(f"not an image of a known format: it begins with {data[:16]!r}") from error
        except Exception as error:
            # Damaged bytes make PIL raise nearly anything: OSError, ValueError, SyntaxError, IndexError, struct.error.
            raise DecodeError(f"the image is damaged: {error or type(error).__name__}") from error


def rgb_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Decode the first frame.

    Returns:
        [H, W, 3] as PIL's convert("RGB") gives it, save that 16-bit gray is scaled to 8 bits where PIL would clip.
    """
    image.load()
    if image.mode in _DEEP_MODES:
        gray = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        # x / 257, rounded: exact for all 16-bit numbers.
        gray8 = ((gray * 255 + 32895) >> 16).astype(np.uint8)
        return np.repeat(gray8[:, :, None], 3, axis=2)
    if image.mode != "RGB":
        # Transparency is dropped, as convert does; left in place it only costs a search through the palette.
        image.info.pop("transparency", None)
        image = image.convert("RGB")
    return np.array(image)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # Damaged EXIF raises nearly anything, and says nothing about the pixels.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned(rgb_HW3: npt.NDArray[np.uint8], exif_orientation: int) -> npt.NDArray[np.uint8]:
    """The photo as its EXIF orientation says. Source: CIPA DC-008 (Exif 2.32), tag Orientation."""
    rgb = rgb_HW3
    if exif_orientation >= 5:
        rgb = rgb.swapaxes(0, 1)
    if exif_orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if exif_orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)
