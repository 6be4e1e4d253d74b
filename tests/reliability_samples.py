"""Damaged shards: how each is made, and what a run must say of it. docs/reliability.md has a line for each."""

from __future__ import annotations

import ctypes
import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from small_world import draw_jpeg

NUM_PHOTOS = 6
SOUND_KEYS = [f"p{row}" for row in range(NUM_PHOTOS)]
BLOCK = 512


# capget and capset: version 3 of their header, and the two capabilities that let root pass over permissions.
CAPABILITY_VERSION = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Permissions count inside, also for root: this thread and those that it starts lose what root has above others."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    before, dropped = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    dropped[:] = before[:]
    dropped[0] &= ~(DAC_OVERRIDE | DAC_READ_SEARCH)
    assert libc.capset(header, dropped) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged shard and the outcome that is owed."""

    name: str
    make: Callable[[], bytes]
    rows: list[str]
    """Keys of the good rows, in order."""
    errors: tuple[tuple[str, int, str, bool], ...] = ()
    """key, row, stage, retryable of each error row."""
    error_text: str = ""
    """Stands in the message of the first error row."""
    cut_at: Callable[[bytes], int] | None = None
    """Where the unit error is: given the shard's bytes, the offset; None where no unit error is owed."""
    unit_text: str = ""
    """Stands in the unit error's message."""
    is_unit_retryable: bool = False
    warning: str = ""
    """Stands in the unit's only warning; "" for none."""
    code: int = 3


def members(names: list[str]) -> list[tuple[str, bytes]]:
    """A photo and its json for each name."""
    found = []
    for seed, name in enumerate(names):
        found += [(f"{name}.jpg", draw_jpeg(seed)), (f"{name}.json", json.dumps({"n": seed}).encode())]
    return found


def tar_bytes(found: list[tuple[str, bytes]]) -> bytes:
    """A plain tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in found:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sound() -> bytes:
    """Six photos, each with its json."""
    return tar_bytes(members(SOUND_KEYS))


def header_at(name: str) -> int:
    """Where the header of a member of `sound` begins."""
    with tarfile.open(fileobj=io.BytesIO(sound())) as tar:
        return tar.getmember(name).offset


def cut(name: str, num_bytes: int) -> bytes:
    """`sound`, ending so many bytes behind the beginning of a member's header."""
    return sound()[: header_at(name) + num_bytes]


def with_header(name: str, change: Callable[[bytes], bytes]) -> bytes:
    """`sound` with one header changed."""
    data, at = sound(), header_at(name)
    return data[:at] + change(data[at : at + BLOCK]) + data[at + BLOCK :]


def with_photo(photo: bytes, extension: str = "jpg") -> bytes:
    """Six photos, the fourth of which is `photo`."""
    found = members(SOUND_KEYS)
    found[6] = (f"p3.{extension}", photo)
    return tar_bytes(found)


def flipped(header: bytes) -> bytes:
    """One bit of the size is another."""
    return header[:130] + bytes([header[130] ^ 1]) + header[131:]


def huge_jpeg() -> bytes:
    """A real JPEG whose header says 30,000 x 30,000."""
    photo = draw_jpeg(3)
    at = photo.index(b"\xff\xc0") + 5
    return photo[:at] + struct.pack(">HH", 30_000, 30_000) + photo[at + 4 :]


def huge_png() -> bytes:
    """A whole PNG of 30,000 x 30,000 black pixels, in 110 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(3751)) for _ in range(30_000)) + packer.flush()
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gzip_cut() -> bytes:
    """Two thirds of a gzipped shard."""
    packed = gzip.compress(sound(), mtime=0)
    return packed[: 2 * len(packed) // 3]


def unpacked_part(packed: bytes) -> bytes:
    """What a cut gzip still holds."""
    return zlib.decompressobj(wbits=31).decompress(packed)


def first_lost(data: bytes) -> int:
    """Where the first member of `sound` begins that is not whole in its first bytes, `data`."""
    with tarfile.open(fileobj=io.BytesIO(sound())) as tar:
        return next(m.offset for m in tar.getmembers() if m.offset_data + m.size > len(data))


def photos_before(offset: int) -> list[str]:
    """Keys of the photos of `sound` that begin before a byte."""
    return [key for key in SOUND_KEYS if header_at(f"{key}.jpg") < offset]


def _photo_case(name: str, make: Callable[[], bytes], text: str) -> Damage:
    """A shard whose fourth photo cannot be decoded."""
    rows = [key for key in SOUND_KEYS if key != "p3"]
    return Damage(name=name, make=make, rows=rows, errors=(("p3", 3, "decode", False),), error_text=text)


def _cut_case(name: str, make: Callable[[], bytes], text: str) -> Damage:
    """A shard that is damaged where its fourth photo begins."""
    return Damage(name=name, make=make, rows=SOUND_KEYS[:3], cut_at=lambda _: header_at("p3.jpg"), unit_text=text)


TWINS = [*members(["p0", "p1"]), ("p2.jpg", draw_jpeg(2)), ("p1.jpg", draw_jpeg(9)), ("p3.jpg", draw_jpeg(3))]
ODD_NAMES = [
    "loc.0.jpg",
    "loc.90.jpg",
    "loc.json",
    "ü/日本.jpg",
    "a.b/c.d.jpg",
    ".hidden.jpg",
    "two words.JPEG",
    "ø" * 120 + ".jpg",
]

DAMAGES = [
    _cut_case("cut-in-data", lambda: cut("p3.jpg", BLOCK + 100), "100 of"),
    _cut_case("cut-in-a-header", lambda: cut("p3.jpg", 200), "200 of 512"),
    _cut_case("cut-at-a-member-boundary", lambda: cut("p3.jpg", 0), "before the mark of its end"),
    _cut_case("zeroed-header", lambda: with_header("p3.jpg", lambda _: bytes(BLOCK)), "header of zeros"),
    _cut_case("flipped-header-byte", lambda: with_header("p3.jpg", flipped), "checksum"),
    Damage(
        name="cut-between-photo-and-json",
        make=lambda: cut("p3.json", 200),
        rows=SOUND_KEYS[:4],
        cut_at=lambda _: header_at("p3.json"),
        unit_text="200 of 512",
    ),
    Damage(
        name="garbage-appended",
        make=lambda: sound() + b"garbage " * 300,
        rows=SOUND_KEYS,
        warning="after the archive's end",
        code=0,
    ),
    Damage(name="empty-file", make=bytes, rows=[], cut_at=lambda _: 0, unit_text="empty (0 bytes)"),
    Damage(
        name="not-a-tar",
        make=lambda: b"<html><body>404</body></html>" * 99,
        rows=[],
        cut_at=lambda _: 0,
        unit_text="not a tar archive",
    ),
    Damage(name="gzipped", make=lambda: gzip.compress(sound(), mtime=0), rows=SOUND_KEYS, code=0),
    Damage(
        name="gzip-cut",
        make=gzip_cut,
        rows=photos_before(first_lost(unpacked_part(gzip_cut()))),
        cut_at=lambda packed: first_lost(unpacked_part(packed)),
        unit_text="gzip",
    ),
    Damage(
        name="concatenated",
        make=lambda: sound() + tar_bytes(members(["q0", "q1"])),
        rows=[*SOUND_KEYS, "q0", "q1"],
        code=0,
    ),
    Damage(
        name="duplicate-keys",
        make=lambda: tar_bytes(TWINS),
        rows=["p0", "p1", "p2", "p3"],
        errors=(("p1", 3, "read", False),),
        error_text="stands twice",
    ),
    Damage(
        name="json-only",
        make=lambda: tar_bytes([member for member in members(SOUND_KEYS) if member[0].endswith("json")]),
        rows=[],
        warning="6 json stand apart",
        code=0,
    ),
    Damage(
        name="json-that-is-none",
        make=lambda: tar_bytes([("p0.jpg", draw_jpeg(0)), ("p0.json", b"{no json"), *members(["p1"])]),
        rows=["p0", "p1"],
        code=0,
    ),
    Damage(
        name="dots-and-unicode-in-keys",
        make=lambda: tar_bytes([(name, draw_jpeg(row)) for row, name in enumerate(ODD_NAMES)]),
        rows=[name.rpartition(".")[0] for name in ODD_NAMES if not name.endswith("json")],
        code=0,
    ),
    _photo_case("truncated-jpg", lambda: with_photo(draw_jpeg(3)[:700]), "truncated"),
    _photo_case("empty-jpg", lambda: with_photo(b""), "empty"),
    Damage(name="one-pixel-jpg", make=lambda: with_photo(draw_jpeg(3, width=1, height=1)), rows=SOUND_KEYS, code=0),
    _photo_case("huge-jpg", lambda: with_photo(huge_jpeg()), "30000 x 30000"),
    _photo_case("huge-png", lambda: with_photo(huge_png(), "png"), "30000 x 30000"),
    _photo_case("text-jpg", lambda: with_photo(b"the photo was removed\n" * 20), "image"),
]
