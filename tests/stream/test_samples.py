from __future__ import annotations

import os
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from stream_samples import Reading, jpeg, numbered, tar_bytes, told, unit_of, write_tar

from geoloc_batch.records import RowError, UnitError
from geoloc_batch.stream import samples as samples_module
from geoloc_batch.stream.left_out import LeftOut
from geoloc_batch.stream.names import member_name
from geoloc_batch.stream.samples import UnitReader
from geoloc_batch.stream.shards import plan_units

PHOTO = jpeg()


def read(tmp_path: Path, *members: tuple[str, bytes], **fields: int) -> Reading:
    return Reading(unit_of(write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT), **fields))


def test_photos_come_in_order_with_key_row_and_json(tmp_path: Path) -> None:
    reading = Reading(unit_of(write_tar(tmp_path / "a.tar", numbered(3))))
    assert told(reading.samples) == [(n, f"{n:05d}", b'{"n": %d}' % n) for n in range(3)]
    assert reading.photos == [jpeg(seed=n) for n in range(3)]
    assert {sample.shard for sample in reading.samples} == {str(tmp_path / "a.tar")}
    assert (reading.reader.num_photos, reading.reader.unit_error, reading.reader.warnings) == (3, None, ())


def test_a_json_may_stand_before_or_after_its_photo(tmp_path: Path) -> None:
    reading = read(tmp_path, ("a.json", b"1"), ("a.jpg", PHOTO), ("b.jpg", PHOTO), ("b.json", b"2"), ("c.jpg", PHOTO))
    assert reading.metas == {"a": b"1", "b": b"2", "c": b""}


def test_the_json_of_the_same_stem_goes_before_the_one_of_the_group(tmp_path: Path) -> None:
    reading = read(
        tmp_path,
        ("d/loc.0.jpg", PHOTO),
        ("d/loc.90.jpg", PHOTO),
        ("d/loc.90.json", b"own"),
        ("d/loc.json", b"shared"),
        ("d/other.0.jpg", PHOTO),
    )
    assert reading.metas == {"d/loc.0": b"shared", "d/loc.90": b"own", "d/other.0": b""}


def test_a_json_of_another_folder_or_of_a_later_group_is_not_taken(tmp_path: Path) -> None:
    reading = read(
        tmp_path, ("a/x.jpg", PHOTO), ("b/x.json", b"1"), ("a/y.jpg", PHOTO), ("z.jpg", PHOTO), ("a/y.json", b"2")
    )
    assert reading.metas == {"a/x": b"", "a/y": b"", "z": b""}
    assert reading.reader.warnings == ("2 json stand apart from any photo of their name",)


def test_every_image_extension_counts_and_other_members_do_not(tmp_path: Path) -> None:
    photos = [
        "a.jpg", "b.JPEG", "c.png", "d.webp", "e.tif", "f.TIFF", "g.bmp", "h.avif", ".i.jpg", "no.dots.in.it.jpg",
        "k.jpe", "l.JFIF", "m.gif",
    ]  # fmt: skip
    others = [
        "a.txt", "a.cls", "x", "__pycache__/x.pyc", "._a.jpg", "d/._b.png", "__MACOSX/c.jpg", "PaxHeaders.1/d.jpg",
        "n.heic", ".jpg", "f.jpg.part",
    ]  # fmt: skip
    reading = read(tmp_path, *[(name, b"1") for name in photos + others])
    assert [sample.key for sample in reading.samples] == [name.rpartition(".")[0] for name in photos]
    assert [sample.row for sample in reading.samples] == list(range(len(photos)))


def test_what_a_mac_adds_does_not_part_a_photo_from_its_json(tmp_path: Path) -> None:
    reading = read(tmp_path, ("._a.jpg", b"m"), ("a.jpg", PHOTO), ("._a.json", b"m"), ("a.json", b"1"))
    assert reading.metas == {"a": b"1"}


@pytest.mark.parametrize(
    ("path", "stem", "extension", "group"),
    [
        ("a.jpg", "a", "jpg", "a"),
        ("x/a.b.JPG", "x/a.b", "jpg", "x/a"),
        ("x.y/a.jpg", "x.y/a", "jpg", "x.y/a"),
        ("./a.0.jpg", "./a.0", "jpg", "./a"),
        ("d/.a.b.jpg", "d/.a.b", "jpg", "d/.a"),
        ("straße.漢.png", "straße.漢", "png", "straße"),
        ("noextension", "noextension", "", "noextension"),
    ],
)
def test_a_name_is_taken_apart(path: str, stem: str, extension: str, group: str) -> None:
    assert member_name(path) == (stem, extension, group)


def test_a_key_that_stands_twice_is_an_error_row_and_takes_a_row(tmp_path: Path) -> None:
    reading = read(
        tmp_path, ("a.jpg", PHOTO), ("b.jpg", PHOTO), ("a.jpg", b"other"), ("a.png", b"more"), ("c.jpg", PHOTO)
    )
    assert [(sample.row, sample.key) for sample in reading.samples] == [(0, "a"), (1, "b"), (4, "c")]
    assert [(error.row, error.key, error.stage, error.retryable) for error in reading.errors] == [
        (2, "a", "read", False),
        (3, "a", "read", False),
    ]
    assert "twice" in reading.errors[0].message
    assert reading.photos == [PHOTO] * 3


def test_too_large_a_photo_or_json_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_PHOTO_BYTES", 3000)
    monkeypatch.setattr(samples_module, "MAX_META_BYTES", 10)
    reading = read(tmp_path, ("a.jpg", b"x" * 3001), ("b.jpg", b"x"), ("b.json", b"1" * 11), ("c.jpg", b"x" * 3000))
    assert [(error.key, error.row) for error in reading.errors] == [("a", 0), ("b", 1)]
    assert [sample.key for sample in reading.samples] == ["c"]


def test_a_group_larger_than_its_bound_goes_on_and_says_which_json_came_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "MAX_GROUP_BYTES", 1 << 20)
    views = [(f"loc.{n:02d}.jpg", os.urandom(300_000)) for n in range(8)]
    reading = read(tmp_path, *views, ("loc.07.json", b"own"), ("loc.json", b"late"))
    assert [sample.key for sample in reading.samples] == [name[:-4] for name, _ in views]
    assert reading.metas["loc.07"] == b"own"
    assert reading.metas["loc.00"] == b""
    assert any("1 json came more than 1 MB after" in text for text in reading.reader.warnings)


def test_a_group_of_json_alone_may_be_larger_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_GROUP_BYTES", 100)
    jsons = [(f"a.{n}.json", b"1" * 80) for n in range(3)]
    reading = read(tmp_path, *jsons, ("b.jpg", PHOTO), ("b.json", b"2"))
    assert told(reading.samples) == [(0, "b", b"2")]
    assert reading.reader.unit_error is None


def test_max_rows_ends_the_reading_with_the_last_photos_json(tmp_path: Path) -> None:
    reading = Reading(unit_of(write_tar(tmp_path / "a.tar", numbered(5)), max_rows=2))
    assert told(reading.samples) == [(0, "00000", b'{"n": 0}'), (1, "00001", b'{"n": 1}')]
    assert reading.reader.num_photos == 2
    assert reading.reader.warnings == ()


def test_damage_keeps_the_photos_before_it_and_sets_the_unit_error(tmp_path: Path) -> None:
    data = tar_bytes(numbered(3))
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    reading = Reading(unit_of(tmp_path / "a.tar"))
    assert len(reading.samples) == reading.reader.num_photos
    assert 0 < len(reading.samples) < 3
    error = reading.reader.unit_error
    assert isinstance(error, UnitError)
    assert error.bytes_unread == len(data) // 2 - error.offset
    assert not error.retryable


def test_a_cut_photo_is_part_of_the_unit_error_and_no_row(tmp_path: Path) -> None:
    data = tar_bytes([("a.jpg", PHOTO), ("b.jpg", bytes(5000))])
    (tmp_path / "a.tar").write_bytes(data[: 512 + -(-len(PHOTO) // 512) * 512 + 512 + 100])
    reading = Reading(unit_of(tmp_path / "a.tar"))
    assert [sample.key for sample in reading.samples] == ["a"]
    assert reading.errors == []
    assert reading.reader.unit_error is not None
    assert "inside b.jpg, 100 of 5000 bytes are there" in reading.reader.unit_error.message


def test_a_shard_that_cannot_be_opened_is_a_unit_error_at_offset_minus_1(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    # What is absent may come back with its mount.
    for name, is_retryable in (("absent.tar", True), ("folder.tar", False)):
        reading = Reading(unit_of(tmp_path / name, num_bytes=77))
        assert reading.items == []
        error = reading.reader.unit_error
        assert error is not None
        assert (error.offset, error.bytes_unread, error.retryable) == (-1, 77, is_retryable)


def test_a_shard_of_json_only_has_no_rows_and_says_so(tmp_path: Path) -> None:
    reading = read(tmp_path, ("a.json", b"1"), ("b.json", b"2"))
    assert reading.items == []
    told = ("it holds no photo", "2 json stand apart from any photo of their name")
    assert reading.reader.warnings == told


def test_photos_in_a_format_that_is_not_read_are_told_by_their_extensions(tmp_path: Path) -> None:
    others = [*[(f"{n}.heic", PHOTO) for n in range(3)], ("x.0.IMG", PHOTO), ("x.1.img", PHOTO), ("README", b"")]
    alone = read(tmp_path, *others, ("dir/y.heic", PHOTO), ("dir/y.json", b"1"))
    assert alone.items == []
    assert alone.reader.warnings == (
        "it holds no photo",
        "left out, no photos: 4 .heic, 2 .img, 1 without extension",
        "1 json stand apart from any photo of their name",
    )
    among = read(tmp_path, ("a.jpg", PHOTO), *others, ("b.jpg", PHOTO))
    assert [sample.key for sample in among.samples] == ["a", "b"]
    assert among.reader.warnings == ("left out, no photos: 3 .heic, 2 .img, 1 without extension",)


def test_what_stands_beside_a_photo_is_not_told(tmp_path: Path) -> None:
    reading = read(
        tmp_path,
        ("a.cls", b"7"),
        ("a.jpg", PHOTO),
        ("a.json", b"1"),
        ("a.txt", b"words"),
        ("loc.0.seg", b""),
        ("loc.0.jpg", PHOTO),
        ("loc.90.jpg", PHOTO),
        ("loc.90.heic", b""),
        ("loc.json", b"2"),
        ("z.png", PHOTO),
        # As in a tar that is sorted by extension.
        ("a.txt", b"more"),
        ("loc.0.txt", b"more"),
    )
    assert reading.metas == {"a": b"1", "loc.0": b"2", "loc.90": b"2", "z": b""}
    assert reading.reader.warnings == ()


def test_a_damaged_shard_without_a_photo_is_not_said_to_hold_none(tmp_path: Path) -> None:
    data = tar_bytes([("a.heic", bytes(2000)), ("b.heic", bytes(2000))])
    (tmp_path / "a.tar").write_bytes(data[:4000])
    reading = Reading(unit_of(tmp_path / "a.tar"))
    assert reading.reader.unit_error is not None
    assert reading.reader.warnings == ("left out, no photos: 2 .heic",)


def test_a_tar_of_many_odd_extensions_is_told_in_few_words_and_little_memory() -> None:
    left_out = LeftOut()
    for n in range(1000):
        left_out.add(f"x{n:03d}")
    left_out.add("y" * 100)
    left_out.add("z\n")
    left_out.add("x001", 5)
    assert len(left_out) == 65
    named = [f"1 .x{n:03d}" for n in (0, 2, 3, 4, 5, 6, 7)]
    assert str(left_out) == ", ".join(["6 .x001", *named, "994 others"])


def test_closing_the_iterator_half_way_closes_the_file(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    items = iter(UnitReader(unit_of(write_tar(tmp_path / "a.tar", numbered(5)))))
    next(items)
    items.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("split_bytes", [1, 4000, 9000, 30000])
def test_ranges_of_a_large_tar_give_the_samples_of_the_whole(tmp_path: Path, form: int, split_bytes: int) -> None:
    members = [
        (f"{folder}/{n}.{view}.{extension}", jpeg(seed=n) if extension == "jpg" else b"%d" % n)
        for folder in ("a", "b" * 120 if form != tarfile.USTAR_FORMAT else "b")
        for n in range(4)
        for view, extension in (("0", "jpg"), ("0", "json"), ("1", "jpg"))
    ]
    shard = write_tar(tmp_path / "a.tar", members, form)
    whole = Reading(unit_of(shard))
    units = plan_units([shard], split_bytes=split_bytes)
    readings = [Reading(unit) for unit in units]
    if split_bytes == 1:
        assert len(units) == 8
    assert len(units) > 1 or split_bytes == 30000
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [(unit.start, unit.stop) for unit in units[1:]] == [
        (before.stop, after.stop) for before, after in pairwise(units)
    ]
    assert sum(unit.num_bytes for unit in units) == os.path.getsize(shard)
    assert [item for reading in readings for item in told(reading.samples)] == told(whole.samples)
    assert [photo for reading in readings for photo in reading.photos] == whole.photos
    assert all(reading.reader.unit_error is None for reading in readings)


def test_row_errors_name_the_shard(tmp_path: Path) -> None:
    (error,) = read(tmp_path, ("a.jpg", PHOTO), ("a.jpg", PHOTO)).errors
    assert isinstance(error, RowError)
    assert error.shard == str(tmp_path / "a.tar")
