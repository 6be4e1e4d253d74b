"""One 512-byte tar header, and the records that extend it: v7, ustar, GNU and PAX.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import adler32

BLOCK = 512
REGULAR = frozenset(b"\0" + b"07")
PLAIN = ord("0"), ord("7")
"""The regular ones that are no folder whatever their name."""
LINKS = frozenset(b"12")
WITHOUT_DATA = frozenset(b"123456")
"""Links, devices, folders and queues: their size field counts no bytes of the archive."""
PAX, PAX_GLOBAL, LONG_NAME, GNU_SPARSE = frozenset(b"xX"), ord("g"), ord("L"), ord("S")
EXTENSIONS = frozenset(b"xXgLK")
"""Headers whose data says something about the member after them."""
FOLDER = ord("5")


class HeaderError(Exception):
    """The block is no tar header; the message says why."""


class Header(NamedTuple):
    """What one header block says."""

    name: str
    size: int
    """Bytes of data that follow in the archive."""
    kind: int
    """The type flag, a byte."""
    sparse_size: int = 0
    """Size of an old GNU sparse member when its holes are filled."""
    has_more_map: bool = False
    """Whether blocks with the rest of a sparse member's map follow."""


def parse_header(block: bytes) -> Header:
    """Read a header block after checking its checksum.

    Raises:
        HeaderError: the block is short, or its checksum or size is wrong.
    """
    if len(block) < BLOCK:
        raise HeaderError(f"it has {len(block)} bytes")
    _check_sum(block)
    kind = block[156]
    name = text(block[:100])
    # GNU tar keeps times where ustar has the prefix, and tells itself by a space after "ustar".
    if block[345] and block[257:263] == b"ustar\0":
        name = f"{text(block[345:500])}/{name}"
    if kind == 0 and name.endswith("/"):
        # Tars older than ustar have no type for folders.
        kind = FOLDER
    size = number(block[124:136], "size")
    if kind == GNU_SPARSE:
        return Header(name, size, kind, number(block[483:495], "sparse size"), bool(block[482]))
    return Header(name, size, kind)


def _check_sum(block: bytes) -> None:
    try:
        stored = number(block[148:156], "checksum")
    except HeaderError:
        raise HeaderError("its checksum cannot be read") from None
    # The checksum's own eight bytes count as spaces.
    total = _byte_sum(block[:148]) + _byte_sum(block[156:256]) + _byte_sum(block[256:]) + 256
    if stored == total:
        return
    # Some old tars summed the bytes as signed ones.
    if stored != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise HeaderError(f"its checksum is wrong (stored {stored}, computed {total})")


def _byte_sum(data: bytes) -> int:
    """sum() of at most 256 bytes, in a tenth of its time: Adler's lower half is the sum modulo 65521, RFC 1950."""
    return adler32(data, 0) & 0xFFFF


class PlainHeaders:
    """Reads the headers of plain files in half the time, by what they share with one before.

    Behind name, mode, owner, size and time the headers of an archive's files are mostly equal: type, owner's name,
    zeros. Nothing is taken on trust: each checksum is compared with the sum of all bytes.
    """

    def __init__(self) -> None:
        # None differs from the tail of every block, a cut one's among them.
        self._tail: bytes | None = None
        self._tail_sum = 0

    def read(self, block: bytes) -> tuple[str, int] | None:
        """Name and size that parse_header would give for a plain file; None where it has to be asked."""
        if block[156:] != self._tail:
            return None
        try:
            stored = int(block[148:156].partition(b"\0")[0], 8)
            size = int(block[124:136].partition(b"\0")[0], 8)
        except ValueError:
            return None
        if stored != (adler32(block[:148], 0) & 0xFFFF) + self._tail_sum or size < 0:
            return None
        return block[:100].partition(b"\0")[0].decode("utf-8", "backslashreplace"), size

    def learn(self, block: bytes) -> None:
        """Take a header that parse_header has accepted as the pattern, if it is one of a plain file, without prefix."""
        if block[156] in PLAIN and not block[345]:
            self._tail = block[156:]
            self._tail_sum = _byte_sum(block[156:256]) + _byte_sum(block[256:]) + 256


def number(field: bytes, what: str) -> int:
    """A number of a header: octal digits, or base 256 where the first byte's high bit is set.

    Raises:
        HeaderError: it is neither, or negative.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True)
        # 0x80 marks a positive number and counts for nothing, 0xff is the sign of a negative one.
        value = value + (1 << (8 * len(field) - 1)) if field[0] == 0x80 else value
    else:
        digits = field.partition(b"\0")[0].strip()
        try:
            value = int(digits, 8) if digits else 0
        except ValueError:
            raise HeaderError(f"its {what} {field!r} is no number") from None
    if value < 0:
        raise HeaderError(f"its {what} is negative ({value})")
    return value


def text(field: bytes) -> str:
    """A name, up to its first NUL. Bytes that are not UTF-8 stay visible as backslash escapes."""
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def parse_pax(data: bytes) -> dict[str, str]:
    r"""The records ``LENGTH KEY=VALUE\n`` of a PAX header.

    Raises:
        HeaderError: the records do not add up.
    """
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        length_text, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length_text.isdigit():
            raise HeaderError("its PAX records are damaged")
        end = at + int(length_text)
        record = data[at + len(length_text) + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or not equals or not record.endswith(b"\n"):
            raise HeaderError("its PAX records are damaged")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "backslashreplace")
        at = end
    return records


def pax_size(value: str) -> int:
    """The size that a PAX record gives, decimal.

    Raises:
        HeaderError: it is no number.
    """
    if not value.isascii() or not value.isdigit():
        raise HeaderError(f"its PAX size {value!r} is no number")
    return int(value)


_KNOWN_BEGINNINGS = {
    b"\xff\xd8\xff": "it is a JPEG photo; pack photos with `geoloc pack`",
    b"PK\x03\x04": "it is a zip; unpack it and use `geoloc pack`",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd; read it through 'pipe:zstd -dc FILE'",
    b"BZh": "it is compressed by bzip2; read it through 'pipe:bzip2 -dc FILE'",
    b"\xfd7zXZ": "it is compressed by xz; read it through 'pipe:xz -dc FILE'",
}


def looks_like(block: bytes) -> str:
    """What a file that is no tar archive may be, by its first bytes, with the remedy where there is one."""
    for magic, what in _KNOWN_BEGINNINGS.items():
        if block.startswith(magic):
            return what
    return f"it begins with {block[:24]!r}"
