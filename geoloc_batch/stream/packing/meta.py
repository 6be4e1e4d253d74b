"""What stands beside a packed photo: its key, its json, and the position and time of its EXIF."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif", "avif"})
"""What a photo's name ends in, in lower case: in tars, in folders that are packed, and on the command line."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_OFFSET = re.compile(r"[+-]\d\d:\d\d")


def portable_key(name: str) -> str:
    r"""A photo's key from its path without the extension, or from a key column.

    Folders stand apart by one "/", also where ``name`` has "\\"; a leading "/", "." and ".." fall away; control
    characters become "_". Dots stay, but not at the start of the last part: readers of WebDataset pass such members
    over. The empty string comes back where nothing is left.
    """
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    if not parts:
        return ""
    bare = parts[-1].lstrip(".")
    parts[-1] = "_" * (len(parts[-1]) - len(bare)) + bare
    return _CONTROL.sub("_", "/".join(parts))


def plain_path(path: str | Path) -> str:
    """A path as text that every file can hold: bytes of a name that are not UTF-8 stand as %E9."""
    return _SURROGATE.sub(lambda found: "".join(f"%{byte:02X}" for byte in os.fsencode(found[0])), str(path))


def split_extension(path: str) -> tuple[str, str]:
    """(path without its last extension, that extension in lower case and without dot, "" where there is none)."""
    dot = path.rfind(".")
    # A dot that begins the last part hides the file and ends no stem.
    if dot <= path.rfind("/") + 1:
        return path, ""
    return path[:dot], path[dot + 1 :].lower()


def sniffed_extension(data: bytes) -> str:
    """The image format that the first bytes tell, as a file's extension, or ""."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return "bmp" if data.startswith(b"BM") else ""


def exif_meta(data: bytes) -> dict[str, JsonValue]:
    """Where and when a photo says it was taken.

    Args:
        data: the photo's file.
    Returns:
        lat and lon in degrees where both are there and can be true ((0, 0), which cameras write for "unknown", and a
        fix marked void are not); time in ISO 8601, with its offset where the photo tells it. Empty for a photo
        without EXIF or that PIL cannot open.
    Source: CIPA DC-008 (Exif 3.0), sections 4.6.6 (GPS attributes) and 4.6.5 (date and time).
    """
    from PIL import ExifTags, Image

    # A broken file makes PIL raise nearly anything, struct.error and SyntaxError among them. The photo is packed as
    # it is, and whether it can be decoded is told when it is decoded.
    try:
        with Image.open(BytesIO(data)) as image:
            # Without the chunk in its head, PIL would decode a whole PNG to look for one behind the pixels.
            if image.format == "PNG" and "exif" not in image.info:
                return {}
            exif = image.getexif()
            gps = dict(exif.get_ifd(ExifTags.IFD.GPSInfo))
            shot = dict(exif.get_ifd(ExifTags.IFD.Exif))
    except Exception:
        return {}
    meta: dict[str, JsonValue] = {}
    position = _position(gps)
    if position is not None:
        meta["lat"], meta["lon"] = position
    time = _time(shot, 0x9003, 0x9011) or _time(shot, 0x9004, 0x9012)
    if time:
        meta["time"] = time
    return meta


def _position(gps: Mapping[int, Any]) -> tuple[float, float] | None:
    """(lat, lon) in degrees from the GPS directory: 1-4 are the references and values, 9 the status."""
    lat = _degrees(gps.get(2), gps.get(1), {"N": 1.0, "S": -1.0})
    lon = _degrees(gps.get(4), gps.get(3), {"E": 1.0, "W": -1.0})
    # Written so that NaN fails too.
    if lat is None or lon is None or not (abs(lat) <= 90.0 and abs(lon) <= 180.0) or (lat == 0.0 and lon == 0.0):
        return None
    return None if _letter(gps.get(9)) == "V" else (lat, lon)


def _degrees(value: Any, reference: object, signs: Mapping[str, float]) -> float | None:
    """Degrees from (degrees, minutes, seconds); None without its hemisphere, which nobody should guess."""
    sign = signs.get(_letter(reference))
    try:
        parts = [float(part) for part in (value if isinstance(value, Sequence) else (value,))]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if sign is None or not 1 <= len(parts) <= 3:
        return None
    return sign * sum((part / 60.0**place for place, part in enumerate(parts)), 0.0)


def _letter(value: object) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
    return text.strip("\0 ").upper()[:1]


def _time(shot: Mapping[int, Any], tag: int, offset_tag: int) -> str | None:
    """ISO 8601 from "2008:10:22 16:28:39" and, where it is there, the offset from UTC "+01:00"."""
    try:
        time = datetime.datetime.strptime(str(shot.get(tag)).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    offset = str(shot.get(offset_tag)).strip("\0 ")
    return time.isoformat() + (offset if _OFFSET.fullmatch(offset) else "")


def sidecar_meta(data: bytes) -> dict[str, JsonValue]:
    """The json beside a photo; text that is no JSON object stands under "json" as it is."""
    text = data.decode("utf-8-sig", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"json": text}
    return value if isinstance(value, dict) else {"json": text}


def merged_meta(exif: Mapping[str, JsonValue], told: Mapping[str, Any]) -> dict[str, JsonValue]:
    """EXIF's words below the user's. A position is taken from one of the two, never half and half."""
    has_position = "lat" in told or "lon" in told
    both = {name: plain_value(value) for name, value in told.items()}
    for name, value in exif.items():
        if both.get(name) is None and not (has_position and name in ("lat", "lon")):
            both[name] = value
    return {_SURROGATE.sub("\ufffd", name): value for name, value in both.items() if value is not None}


def plain_value(value: object) -> JsonValue:
    """A value of a table or a sidecar as JSON has it: times in ISO 8601, NaN and infinities as null."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float | decimal.Decimal):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {_SURROGATE.sub("\ufffd", str(name)): plain_value(part) for name, part in value.items()}
    if isinstance(value, Sequence):
        return [plain_value(part) for part in value]
    return str(value)


def json_bytes(meta: Mapping[str, JsonValue]) -> bytes:
    """The json member of a sample: UTF-8, one line, the order as it came."""
    return json.dumps(meta, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
