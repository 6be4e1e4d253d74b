from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_samples import Walk, numbered, tar_bytes, write_bytes, write_tar

from geoloc_batch.errors import DamageError
from geoloc_batch.stream import tar as tar_module
from geoloc_batch.stream.source import open_source
from geoloc_batch.stream.tar import TarReader
from geoloc_batch.stream.tar_header import BLOCK

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

NAMES = st.lists(
    st.text(st.sampled_from("ab.ä漢 -_0"), min_size=1, max_size=60).filter(lambda part: part not in (".", "..")),
    min_size=1,
    max_size=6,
).map("/".join)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1400)), max_size=8)


def as_tarfile_reads(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["gnu", "pax"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(members=MEMBERS)
def test_members_are_those_that_tarfile_reads(tmp_path: Path, form: str, members: list[tuple[str, bytes]]) -> None:
    path = write_bytes(tmp_path / "a.tar", tar_bytes(members, FORMS[form]))
    walk = Walk(path)
    assert walk.damage is None
    assert walk.members == as_tarfile_reads(path) == [(name.rstrip("/"), data) for name, data in members]
    assert walk.warnings == []


@pytest.mark.parametrize("form", FORMS)
def test_long_names_are_read_in_every_format(tmp_path: Path, form: str) -> None:
    # ustar splits at a slash into prefix and name; GNU and PAX put the name before the header.
    name = "/".join(["folder" * 8] * 3) + "/" + "n" * 50 + ".jpg"
    walk = Walk(write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), (name, b"22"), ("y.jpg", b"333")], FORMS[form]))
    assert walk.members == [("x.jpg", b"1"), (name, b"22"), ("y.jpg", b"333")]


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_archives_of_the_tar_program_are_read(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    names = ["a.jpg", "inner/b.jpg"] + (["inner/" + "long" * 30 + ".jpg"] if form not in ("v7", "ustar") else [])
    for number, name in enumerate(names):
        (folder / name).write_bytes(os.urandom(700 * number))
    os.link(folder / "a.jpg", folder / "hard.jpg")
    (folder / "soft.jpg").symlink_to("a.jpg")
    subprocess.run(["tar", f"--format={form}", "-cf", "a.tar", "-C", folder, "."], cwd=tmp_path, check=True)
    walk = Walk(tmp_path / "a.tar")
    assert walk.members == as_tarfile_reads(tmp_path / "a.tar")
    assert len(walk.members) == len(names)
    assert [text for text in walk.warnings if text.startswith("2 links were skipped")]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_sparse_member_is_named_as_a_problem_and_those_behind_it_are_read(tmp_path: Path, form: str) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        for position in range(0, 40 << 16, 1 << 16):
            file.seek(position)
            file.write(b"x" * 5000)
    (tmp_path / "b.jpg").write_bytes(b"whole")
    command = ["tar", f"--format={form}", "--sparse", "-cf", "s.tar", "a.jpg", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "s.tar") as tar:
        if not tar.getmember("a.jpg").issparse():
            pytest.skip("this file system has no holes")
    walk = Walk(tmp_path / "s.tar")
    assert walk.problems == ["a.jpg"]
    assert walk.members == [("b.jpg", b"whole")]


def test_a_size_in_base_256_is_read(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([("a.jpg", b"q" * 700), ("b.jpg", b"z")]))
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    repair_checksum(data)
    assert Walk(write_bytes(tmp_path / "a.tar", data)).members == [("a.jpg", b"q" * 700), ("b.jpg", b"z")]


def repair_checksum(data: bytearray, at: int = 0) -> None:
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def test_pax_headers_give_path_and_size_and_global_ones_last(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as tar:
        info = tarfile.TarInfo("short.jpg")
        info.pax_headers = {"path": "über/" + "p" * 200 + ".jpg"}
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    path = write_bytes(tmp_path / "a.tar", file.getvalue())
    source = open_source(str(path))
    reader = TarReader(source)
    assert [member.name for member in reader] == ["über/" + "p" * 200 + ".jpg"]
    assert reader.has_global_header
    source.close()


def test_a_name_that_is_not_utf_8_becomes_text_that_can_be_stored(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([("caf#.jpg", b"1")]))
    data[3] = 0xE9
    repair_checksum(data)
    assert Walk(write_bytes(tmp_path / "a.tar", data)).members == [("caf\\xe9.jpg", b"1")]


TWO = tar_bytes([("a.jpg", b"a" * 700), ("b.jpg", b"b" * 500)])


@pytest.mark.parametrize(
    ("length", "num_whole", "offset"),
    [
        (100, 0, 0),
        (511, 0, 0),
        (512, 0, 0),
        (1000, 0, 0),
        (1211, 0, 0),
        (1212, 1, None),
        (1400, 1, None),
        (1536, 1, 1536),
        (1537, 1, 1536),
        (2047, 1, 1536),
        (2048, 1, 1536),
        (2547, 1, 1536),
        (2548, 2, None),
        (2560, 2, 2560),
    ],
)
def test_a_tar_cut_anywhere_gives_its_whole_members_and_a_damage(
    tmp_path: Path, length: int, num_whole: int, offset: int | None
) -> None:
    walk = Walk(write_bytes(tmp_path / "a.tar", TWO[:length]))
    assert [name for name, _ in walk.members] == ["a.jpg", "b.jpg"][:num_whole]
    assert walk.damage is not None
    assert not walk.damage.retryable
    if offset is not None:
        assert walk.damage.offset == offset
    assert walk.damage.bytes_unread == length - walk.damage.offset


@pytest.mark.parametrize("length", [3072, 3584, 4000, 10240])
def test_a_tar_with_a_mark_of_its_end_is_whole(tmp_path: Path, length: int) -> None:
    walk = Walk(write_bytes(tmp_path / "a.tar", TWO[:length]))
    assert walk.damage is None
    assert len(walk.members) == 2


def test_no_cut_loses_a_member_in_silence(tmp_path: Path) -> None:
    for length in range(0, len(TWO), 37):
        cut = Walk(write_bytes(tmp_path / "cut.tar", TWO[:length]))
        assert len(cut.members) == 2 or cut.damage is not None, length


def test_no_flipped_bit_of_a_header_loses_a_member_in_silence(tmp_path: Path) -> None:
    unnoticed = set()
    for start, num_before in ((0, 0), (1536, 1)):
        for position in range(BLOCK):
            for bit in range(8):
                flipped = bytearray(TWO)
                flipped[start + position] ^= 1 << bit
                walk = Walk(write_bytes(tmp_path / "flipped.tar", flipped))
                if walk.damage is None:
                    unnoticed.add((position, bit))
                    assert walk.members == [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 500)]
                else:
                    assert len(walk.members) == num_before
    # The checksum's own field: its first digit "0" becomes a space, its NUL a space, or what follows the NUL changes.
    assert unnoticed == {(148, 4), (154, 5)} | {(155, bit) for bit in range(8)}


def test_a_zeroed_header_is_a_damage_and_not_the_end(tmp_path: Path) -> None:
    walk = Walk(write_bytes(tmp_path / "a.tar", TWO[:1536] + bytes(512) + TWO[2048:]))
    assert walk.damage is not None
    assert (walk.damage.offset, walk.damage.bytes_unread) == (1536, 10240 - 1536)


def test_a_zeroed_stretch_with_headers_behind_it_is_a_damage(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([(f"{n}.jpg", os.urandom(3000)) for n in range(6)]))
    data[3584 : 3584 + 1024] = bytes(1024)
    walk = Walk(write_bytes(tmp_path / "a.tar", data))
    assert [name for name, _ in walk.members] == ["0.jpg"]
    assert walk.damage is not None
    assert walk.damage.offset == 3584


def test_garbage_after_the_end_is_a_warning(tmp_path: Path) -> None:
    walk = Walk(write_bytes(tmp_path / "a.tar", TWO + b"garbage" * 300))
    assert walk.damage is None
    assert len(walk.members) == 2
    assert walk.warnings == ["2100 bytes after the archive's end, at byte 10240, were ignored"]


def test_concatenated_archives_are_read_through(tmp_path: Path) -> None:
    data = tar_bytes(numbered(2)) + tar_bytes(numbered(3, first=2), tarfile.PAX_FORMAT) + tar_bytes([])
    walk = Walk(write_bytes(tmp_path / "a.tar", data))
    assert (walk.members, walk.damage, walk.warnings) == (numbered(5), None, [])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"hello", "not a tar archive: it begins with b'hello'"),
        (b"<html>" * 400, "not a tar archive"),
        (b"\xff\xd8\xff\xe0" * 300, "JPEG"),
        (b"\x28\xb5\x2f\xfd" * 300, "pipe:zstd -dc"),
    ],
)
def test_what_is_no_tar_is_said_at_offset_0(tmp_path: Path, data: bytes, words: str) -> None:
    walk = Walk(write_bytes(tmp_path / "a.tar", data))
    assert walk.damage is not None
    assert words in str(walk.damage)
    assert (walk.damage.offset, walk.damage.bytes_unread) == (0, len(data))


def test_an_empty_archive_is_whole(tmp_path: Path) -> None:
    assert Walk(write_bytes(tmp_path / "a.tar", tar_bytes([]))).damage is None


def test_a_file_that_shrinks_while_it_is_read_is_a_retryable_damage(tmp_path: Path) -> None:
    members = [(f"{n:03d}.jpg", os.urandom(100_000)) for n in range(60)]
    path = write_bytes(tmp_path / "a.tar", tar_bytes(members))
    source = open_source(str(path))
    reader = TarReader(source)
    read: list[tuple[str, bytes]] = []

    def read_all() -> None:
        for member in reader:
            read.append((member.name, reader.read()))
            if len(read) == 5:
                os.truncate(path, 3_000_000)

    with pytest.raises(DamageError, match="shrank from") as caught:
        read_all()
    source.close()
    assert caught.value.retryable
    assert read == members[: len(read)]
    assert caught.value.bytes_unread == len(tar_bytes(members)) - caught.value.offset


def test_members_that_are_not_read_are_skipped_without_reading_them(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.tar", tar_bytes([("a.bin", bytes(5 << 20)), ("b.jpg", b"1")]))
    source = open_source(str(path))
    names = [member.name for member in TarReader(source)]
    source.close()
    assert names == ["a.bin", "b.jpg"]


def test_a_member_larger_than_the_file_fills_no_memory(tmp_path: Path) -> None:
    data = bytearray(TWO)
    data[124:136] = b"\x80" + (1 << 50).to_bytes(11, "big")
    repair_checksum(data)
    walk = Walk(write_bytes(tmp_path / "a.tar", data))
    assert walk.members == []
    assert walk.damage is not None
    assert walk.damage.offset == 0


def test_an_extended_header_that_announces_too_much_is_a_damage(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([("n" * 150, b"1")], tarfile.GNU_FORMAT))
    data[124:136] = b"%011o\0" % (tar_module.MAX_EXTENSION_BYTES + 1)
    repair_checksum(data)
    walk = Walk(write_bytes(tmp_path / "a.tar", data))
    assert walk.damage is not None
    assert "bytes of names" in str(walk.damage)


@pytest.mark.parametrize("records", [b"12 path=a\n", b"x path=a\n", b"8 path=a\n", b"30 path=a\n"])
def test_damaged_pax_records_are_a_damage(tmp_path: Path, records: bytes) -> None:
    header = bytearray(tar_bytes([("pax", records)]))
    header[156:157] = b"x"
    repair_checksum(header)
    walk = Walk(write_bytes(tmp_path / "a.tar", header[:1024] + TWO))
    assert walk.damage is not None
    assert "PAX records" in str(walk.damage)
