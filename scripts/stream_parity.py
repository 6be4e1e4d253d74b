"""Whether the stream's pixels are those of transformers' CLIPImageProcessor, and how far PIL's are from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from stream_contenders import SIDE, clip_processor, streamed_pixels
from stream_photos import write_shard


@dataclass(frozen=True)
class Drift:
    """What the comparison found."""

    num_unlike: int
    """Photos of which any value differs from CLIPImageProcessor's."""
    max_levels: int
    """Largest difference from PIL's bicubic, of 255."""
    min_identical: float
    """Share of values equal to PIL's, in the photo where it is least."""

    def is_within(self, max_levels: int, min_identical: float) -> bool:
        """Whether speed may be spoken of."""
        return not self.num_unlike and self.max_levels <= max_levels and self.min_identical >= min_identical


def drift_of(folder: Path, photos: Sequence[bytes]) -> Drift:
    """Send photos through the whole stream and compare what comes out."""
    write_shard(folder / "parity.tar", photos)
    ours = streamed_pixels(str(folder / "parity.tar"))
    assert len(ours) == len(photos), f"{len(ours)} of {len(photos)} photos came"
    processor = clip_processor(do_rescale=False, do_normalize=False)
    unlike, levels, identical = 0, [], []
    for row, data in enumerate(photos):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
        unlike += not np.array_equal(ours[row], theirs)
        apart = np.abs(ours[row].astype(int) - by_pil(image))
        levels.append(int(apart.max()))
        identical.append(float((apart == 0).mean()))
    return Drift(unlike, max(levels), round(min(identical), 5))


def by_pil(image: Image.Image) -> NDArray[np.int64]:
    """PIL's own bicubic and the same centre crop, [S, S, 3]."""
    shorter, longer = min(image.size), max(image.size)
    other = int(SIDE * longer / shorter)
    width, height = (SIDE, other) if image.width <= image.height else (other, SIDE)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + SIDE, top + SIDE))).astype(int)
