"""The photos and shards that bench_stream.py measures on: painted street scenes, and real photos where there are some.

Shape letters: H, W a photo's height and width.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geoloc_batch.demo.photos import draw_photos
from geoloc_batch.demo.world import Looks

STREET_BYTES = (60_000, 130_000)
NUM_SHARDS = 12


@dataclass(frozen=True)
class PhotoSet:
    """Photos of one kind, as files and packed."""

    name: str
    distinct: tuple[bytes, ...]
    num_photos: int
    """Photos in all shards together; the distinct ones come again and again, under other keys."""
    shards: tuple[str, ...]
    batch_size: int

    @property
    def photos(self) -> list[bytes]:
        """The photos in the shards' order."""
        return list(islice(cycle(self.distinct), self.num_photos))

    def half(self) -> PhotoSet:
        """The first half of the shards, for those who are slower."""
        return replace(self, num_photos=self.num_photos // 2, shards=self.shards[: len(self.shards) // 2])


def packed(folder: Path, name: str, distinct: Sequence[bytes], per_shard: int, batch_size: int) -> PhotoSet:
    """Pack photos, each with its json, in twelve shards: webdataset's workers take whole ones."""
    photos, shards = cycle(distinct), []
    for number in range(NUM_SHARDS):
        path = folder / f"{name.replace(' ', '-')}-{number:02d}.tar"
        write_shard(path, list(islice(photos, per_shard)))
        shards.append(str(path))
    return PhotoSet(name, tuple(distinct), per_shard * NUM_SHARDS, tuple(shards), batch_size)


def write_shard(path: Path, photos: Sequence[bytes]) -> None:
    """A tar as webdataset's writers make it: a photo, then its json."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, photo in enumerate(photos):
            meta = json.dumps({"lat": 40 + row / 1000, "lon": 10 - row / 1000}).encode()
            for extension, data in (("jpg", photo), ("json", meta)):
                info = tarfile.TarInfo(f"{row:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def street_photos(count: int, seed: int = 0) -> list[bytes]:
    """640 x 640 JPEGs of 60 to 130 kB."""
    qualities = np.linspace(75, 88, count).round().astype(int).tolist()
    photos = [jpeg(scene, quality) for scene, quality in zip(scenes(count, 640, seed), qualities, strict=True)]
    sizes = [len(photo) for photo in photos]
    low, high = STREET_BYTES
    assert low <= min(sizes) <= max(sizes) <= high, f"photos of {min(sizes)} to {max(sizes)} bytes"
    return photos


def large_photos(count: int, width: int, seed: int) -> list[bytes]:
    """4:3 JPEGs of a camera: `width` x 3/4 `width` pixels."""
    height = width * 3 // 4
    grain = np.random.default_rng(seed).normal(0, 5, (height, width, 1)).astype(np.float32)
    photos = []
    for scene in scenes(count, 800, seed):
        # Painted small and enlarged, since painting costs more than all the rest; the grain is what a sensor adds.
        image = Image.fromarray(scene[100:700]).resize((width, height), Image.Resampling.BICUBIC)
        photos.append(jpeg(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8), 88))
    return photos


def odd_photos() -> list[bytes]:
    """What resizing can get wrong: long, thin, odd and small photos, progressive ones, gray ones."""
    (scene,) = scenes(1, 640, 7)
    sizes = ((640, 201), (97, 640), (336, 336), (337, 335), (100, 80), (41, 640), (511, 333))
    photos = [jpeg(scene[:height, :width], 90) for height, width in sizes]
    for image, options in ((Image.fromarray(scene), {"progressive": True}), (Image.fromarray(scene).convert("L"), {})):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, **options)
        photos.append(file.getvalue())
    return photos


def real_photos(folder: Path) -> list[bytes]:
    """The JPEGs of a folder and of those in it; none where there is no such folder."""
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]


def scenes(count: int, side: int, seed: int) -> NDArray[np.uint8]:
    """Painted street scenes, [count, side, side, 3] RGB."""
    rng = np.random.default_rng(seed)
    looks = Looks(*(rng.random(count) for _ in fields(Looks)))
    return draw_photos(looks, rng.uniform(0, 360, count), rng, side)


def jpeg(rgb_HW3: NDArray[np.uint8], quality: int) -> bytes:
    """As cameras write it: 4:2:0, baseline."""
    file = io.BytesIO()
    Image.fromarray(rgb_HW3).save(file, "JPEG", quality=quality)
    return file.getvalue()
