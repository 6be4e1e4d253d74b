from __future__ import annotations

import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.stream.tar_header import BLOCK, PLAIN, HeaderError, PlainHeaders, parse_header

NAMES = st.text(st.sampled_from("ab.ä漢 -_/\0"), max_size=30)


def header(name: str = "a.jpg", size: int = 5, kind: bytes = b"0", **fields: object) -> bytes:
    """One 512-byte header as the standard library writes it."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)[:BLOCK]


def resummed(block: bytes) -> bytes:
    """The block with a checksum that fits it."""
    total = sum(block) - sum(block[148:156]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def learned(block: bytes) -> PlainHeaders:
    headers = PlainHeaders()
    parse_header(block)
    headers.learn(block)
    return headers


def told(block: bytes) -> tuple[str, int] | None:
    """Name and size by the long way; None for what is no header of a plain file."""
    try:
        parsed = parse_header(block)
    except HeaderError:
        return None
    return (parsed.name, parsed.size) if parsed.kind in PLAIN else None


def test_a_header_like_the_one_before_is_read_the_short_way() -> None:
    headers = learned(header("a.jpg", 5))
    assert headers.read(header("folder/b.json", 123456, mtime=77, mode=0o600, uid=1)) == ("folder/b.json", 123456)


def test_every_flipped_bit_of_a_header_is_seen_the_short_way_too() -> None:
    block = header("b.jpg", 123456, mtime=1_700_000_000, uname="käthe")
    headers = learned(header("a.jpg", uname="käthe"))
    assert headers.read(block) is not None
    for bit in range(8 * BLOCK):
        damaged = bytearray(block)
        damaged[bit // 8] ^= 1 << bit % 8
        short = headers.read(bytes(damaged))
        # Some flips change nothing that is read, a letter's case in an octal field's padding for one: both ways agree.
        assert short is None or short == told(bytes(damaged)), f"bit {bit}"


@settings(max_examples=300, deadline=None)
@given(
    name=NAMES,
    size=st.binary(min_size=12, max_size=12) | st.from_regex(rb"[ 0-7-]{11}[\0 7]", fullmatch=True),
    kind=st.sampled_from(b"\0" + b"0127xgLS"),
    other=st.sampled_from(b"\0" + b"07"),
    prefix=st.sampled_from([b"\0", b"p"]),
)
def test_the_short_way_says_what_the_long_one_says(
    name: str, size: bytes, kind: int, other: int, prefix: bytes
) -> None:
    def of(kind: int) -> bytes:
        block = header("x.jpg", uname="u")
        block = name.encode()[:100].ljust(100, b"\0") + block[100:124] + size + block[136:156]
        return resummed((block + bytes([kind])).ljust(345, b"\0") + prefix.ljust(BLOCK - 345, b"\0"))

    pattern = resummed(header("x.jpg", 5, bytes([other]))[:257] + of(other)[257:])
    short = learned(pattern).read(of(kind))
    assert short is None or short == told(of(kind))


@pytest.mark.parametrize("length", [0, 1, 100, 147, 148, 150, 155, 156, 157, 511])
def test_a_cut_block_is_never_read_the_short_way(length: int) -> None:
    # The sum of such a block may be right, with what is missing counted as nothing.
    block = header()[:148] + b"%06o\0 " % sum(header()[:148]) + header()[156:]
    for headers in (PlainHeaders(), learned(header())):
        assert headers.read(block[:length]) is None


def test_a_sum_of_signed_bytes_is_left_to_the_long_way() -> None:
    block = header("käthe.jpg")
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:]) + 8 * 32
    old = block[:148] + b"%06o\0 " % signed + block[156:]
    assert learned(header()).read(old) is None
    assert told(old) == ("käthe.jpg", 5)


def test_sizes_of_twelve_digits_and_in_base_256_are_read_whole() -> None:
    headers = learned(header())
    twelve = resummed(header()[:124] + b"000000001234" + header()[136:])
    assert headers.read(twelve) == ("a.jpg", 0o1234) == told(twelve)
    large = header(size=1 << 40)
    assert headers.read(large) is None
    assert told(large) == ("a.jpg", 1 << 40)
