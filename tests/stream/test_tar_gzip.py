"""Compressed archives: known by their magic, read member by member, damage told."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from stream_samples import Walk, numbered, tar_bytes, write_bytes


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_gzip_is_known_by_its_magic_and_not_by_its_name(tmp_path: Path, suffix: str) -> None:
    members = numbered(5)
    path = write_bytes(tmp_path / f"a.{suffix}", gzip.compress(tar_bytes(members)))
    walk = Walk(path)
    assert (walk.members, walk.damage, walk.warnings) == (members, None, [])


def test_gzip_members_one_after_another_are_read_as_one(tmp_path: Path) -> None:
    data = tar_bytes(numbered(5))
    packed = gzip.compress(data[:3000]) + gzip.compress(data[3000:]) + bytes(700)
    assert Walk(write_bytes(tmp_path / "a.tgz", packed)).members == numbered(5)


def test_a_cut_gzip_gives_its_whole_members_and_a_damage(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", os.urandom(2000)) for n in range(40)]
    packed = gzip.compress(tar_bytes(members))
    walk = Walk(write_bytes(tmp_path / "a.tgz", packed[: len(packed) // 2]))
    assert walk.damage is not None
    assert walk.damage.bytes_unread is None
    assert "the compressed stream ends too early" in str(walk.damage)
    assert 10 < len(walk.members) < 30
    assert walk.members == members[: len(walk.members)]


def test_a_flipped_bit_in_gzip_is_a_damage(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(tar_bytes([("a.jpg", os.urandom(5000)), ("b.jpg", bytes(9000))])))
    packed[-6] ^= 1
    walk = Walk(write_bytes(tmp_path / "a.tgz", packed))
    assert walk.damage is not None
    assert "gzip" in str(walk.damage)


def test_bytes_after_gzip_are_a_warning(tmp_path: Path) -> None:
    walk = Walk(write_bytes(tmp_path / "a.tgz", gzip.compress(tar_bytes(numbered(2))) + b"tail"))
    assert walk.damage is None
    assert walk.warnings == ["4 bytes after the end of the gzip stream were ignored"]


# Two members: header at 0, data at 512 (700 bytes, padded to 1024), header at 1536, data at 2048, zeros from 2560.
