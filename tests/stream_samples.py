"""Photos, tars and units for the tests of reading."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geoloc_batch.errors import DamageError
from geoloc_batch.records import RowError, Sample, Unit
from geoloc_batch.stream.samples import UnitReader
from geoloc_batch.stream.source import open_source
from geoloc_batch.stream.tar import TarReader

Members = Iterable[tuple[str, bytes]]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(height: int = 24, width: int = 32, seed: int = 0, **options: Any) -> bytes:
    return encoded(Image.fromarray(noise(height, width, seed=seed)), **options)


def tar_bytes(members: Members, form: int = tarfile.USTAR_FORMAT, **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_bytes(path: Path, data: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> str:
    path.write_bytes(tar_bytes(members, form))
    return str(path)


def numbered(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """A photo and its json for each number."""
    pairs = [((f"{n:05d}.jpg", jpeg(seed=n)), (f"{n:05d}.json", b'{"n": %d}' % n)) for n in range(first, first + count)]
    return [member for pair in pairs for member in pair]


def unit_of(shard: str | Path, **fields: Any) -> Unit:
    return Unit(**{"index": 0, "kind": "shard", "source": str(shard), **fields})


class Walk:
    """The members that the reader gives, and how it ends."""

    def __init__(self, shard: str | Path) -> None:
        self.members: list[tuple[str, bytes]] = []
        self.problems: list[str] = []
        self.damage: DamageError | None = None
        source = open_source(str(shard))
        tar = TarReader(source)
        try:
            for member in tar:
                if member.problem:
                    self.problems.append(member.name)
                else:
                    self.members.append((member.name, tar.read()))
        except DamageError as damage:
            self.damage = damage
        finally:
            source.close()
        self.warnings = tar.warnings


class Reading:
    """The samples and errors of one unit."""

    def __init__(self, unit: Unit) -> None:
        self.reader = UnitReader(unit)
        self.items = list(self.reader)
        self.samples = [item[0] for item in self.items if not isinstance(item, RowError)]
        self.photos = [item[1] for item in self.items if not isinstance(item, RowError)]
        self.errors = [item for item in self.items if isinstance(item, RowError)]

    @property
    def metas(self) -> dict[str, bytes]:
        return {sample.key: sample.meta for sample in self.samples}


def told(samples: Iterable[Sample]) -> list[tuple[int, str, bytes]]:
    """What identifies samples, whichever unit they came from."""
    return [(sample.row, sample.key, sample.meta) for sample in samples]
