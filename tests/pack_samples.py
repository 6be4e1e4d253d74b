"""Photos, and what a shard holds, for the tests of packing."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import IFDRational


def photo_bytes(shade: int = 128, kind: str = "JPEG", exif: Image.Exif | None = None) -> bytes:
    file = BytesIO()
    Image.new("RGB", (17, 13), (shade, 90, 30)).save(file, kind, **({} if exif is None else {"exif": exif}))
    return file.getvalue()


def gps_exif(lat: tuple[float, ...], lat_ref: str, lon: tuple[float, ...], lon_ref: str, **more: Any) -> Image.Exif:
    exif = Image.Exif()
    gps = exif.get_ifd(0x8825)
    gps.update({1: lat_ref, 2: tuple(map(IFDRational, lat)), 3: lon_ref, 4: tuple(map(IFDRational, lon))})
    gps.update({9: more["status"]} if "status" in more else {})
    shot = exif.get_ifd(0x8769)
    shot.update({0x9003: more["time"], 0x9011: more.get("offset", "")} if "time" in more else {})
    # PIL takes an Exif without tags of its own for an empty one, and writes a TIFF's directories only by their tags.
    exif[0x8825] = exif[0x8769] = 0
    return exif


def write_photos(folder: Path, *names: str) -> dict[str, bytes]:
    written = {}
    for number, name in enumerate(names):
        written[name] = photo_bytes(number)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(written[name])
    return written


def members(*shards: Path) -> dict[str, bytes]:
    """Name and bytes of every member, in order."""
    found: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def metas(*shards: Path) -> dict[str, dict[str, Any]]:
    """Every json by its key."""
    return {name[:-5]: json.loads(data) for name, data in members(*shards).items() if name.endswith(".json")}
