"""Packing folders and photos: keys, metadata, shards, and what a kill leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import gps_exif, members, metas, photo_bytes, write_photos
from PIL import Image

from geoloc_batch.errors import InputError
from geoloc_batch.records import RowError, Unit
from geoloc_batch.stream.pack import pack
from geoloc_batch.stream.packing.meta import exif_meta, portable_key
from geoloc_batch.stream.samples import UnitReader


def test_photos_are_stored_byte_for_byte_each_before_its_json(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", "b/2.png", "a/1.JPG", "z.jpeg")
    summary = pack(tmp_path / "in", tmp_path / "out")
    found = members(tmp_path / "out" / "000000.tar")
    assert list(found) == ["z.jpeg", "z.json", "a/1.jpg", "a/1.json", "b/2.png", "b/2.json"]
    assert found["a/1.jpg"] == photos["a/1.JPG"]
    assert found["b/2.png"] == photos["b/2.png"]
    assert json.loads(found["a/1.json"]) == {"path": "a/1.JPG"}
    size = (tmp_path / "out" / "000000.tar").stat().st_size
    assert (summary.shards, summary.photos, summary.bytes, summary.skipped) == (1, 3, size, 0)


def test_the_same_photos_give_the_same_bytes_whenever_they_were_taken_down(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_photos(tmp_path / name, "ä/é.jpg", "b.jpg", f"{'long' * 60}.jpg")
        pack(tmp_path / name, tmp_path / f"{name}-out")
        os.utime(tmp_path / name / "b.jpg", (1, 1))
    one, two = ((tmp_path / f"{name}-out" / "000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) % tarfile.RECORDSIZE == 0


def test_names_beyond_ascii_and_beyond_100_letters_come_back_whole(tmp_path: Path) -> None:
    names = ["Göteborg/ö 1.jpg", "東京.jpg", f"{'d' * 120}/{'e' * 200}.jpg", "a b.jpg"]
    write_photos(tmp_path / "in", *names)
    pack(tmp_path / "in", tmp_path / "out")
    assert {meta["path"] for meta in metas(tmp_path / "out" / "000000.tar").values()} == set(names)
    assert {f"{key}.jpg" for key in metas(tmp_path / "out" / "000000.tar")} == set(names)


def test_a_name_that_is_not_utf8_is_packed_with_its_bytes_spelled_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg")).write_bytes(photo_bytes())
    pack(tmp_path / "in", tmp_path / "out")
    assert metas(tmp_path / "out" / "000000.tar") == {"caf%E9": {"path": "caf%E9.jpg"}}


@pytest.mark.parametrize(
    ("shard_photos", "shard_mb", "expected"), [(3, 1000, [3, 3, 1]), (1, 1000, [1] * 7), (7, 1, [7])]
)
def test_shards_hold_as_many_photos_as_they_may(
    tmp_path: Path, shard_photos: int, shard_mb: int, expected: list[int]
) -> None:
    write_photos(tmp_path / "in", *(f"{number}.jpg" for number in range(7)))
    summary = pack(tmp_path / "in", tmp_path / "out", shard_photos=shard_photos, shard_mb=shard_mb)
    shards = sorted((tmp_path / "out").iterdir())
    assert [shard.name for shard in shards] == [f"{number:06d}.tar" for number in range(len(expected))]
    assert [len(metas(shard)) for shard in shards] == expected
    assert len(metas(*shards)) == summary.photos == 7


def test_a_shard_never_grows_past_its_size_but_a_larger_photo_gets_one_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, size in enumerate([400_000, 400_000, 400_000, 1_500_000, 10]):
        (tmp_path / "in" / f"{number}.bmp").write_bytes(b"BM" + bytes(size))
    pack(tmp_path / "in", tmp_path / "out", shard_mb=1)
    shards = sorted((tmp_path / "out").iterdir())
    assert [len(metas(shard)) for shard in shards] == [2, 1, 1, 1]
    assert [shard.stat().st_size > 1_000_000 for shard in shards] == [False, False, True, False]


def test_positions_of_real_photos_are_those_that_pil_reads(real_photos: list[Path], tmp_path: Path) -> None:
    folder = real_photos[0].parents[1]
    summary = pack(folder, tmp_path / "out")
    assert summary.photos == len(real_photos)
    found = metas(tmp_path / "out" / "000000.tar")
    located = 0
    for photo in real_photos:
        with Image.open(photo) as image:
            gps = image.getexif().get_ifd(0x8825)
        meta = found[photo.relative_to(folder).with_suffix("").as_posix()]
        assert ("lat" in meta) == (2 in gps)
        if 2 in gps:
            degrees, minutes, seconds = map(float, gps[2])
            assert meta["lat"] == pytest.approx(degrees + (minutes + seconds / 60) / 60, abs=1e-9)
            degrees, minutes, seconds = map(float, gps[4])
            assert meta["lon"] == pytest.approx(degrees + (minutes + seconds / 60) / 60, abs=1e-9)
            located += 1
    assert located >= 12
    # Arezzo and the Museum Island, looked up on a map.
    assert (found["gps/DSCN0010"]["lat"], found["gps/DSCN0010"]["lon"]) == pytest.approx((43.4674, 11.8851), abs=1e-4)
    assert found["gps/DSCN0010"]["time"] == "2008-10-22T16:28:39"
    assert (found["berlin/01"]["lat"], found["berlin/01"]["lon"]) == pytest.approx((52.5189, 13.4003), abs=1e-4)


def test_the_southern_and_western_halves_are_negative() -> None:
    exif = gps_exif((22, 57, 6.84), "S", (43, 12.63), "W", time="2020:01:02 03:04:05", offset="-03:00")
    expected = {"lat": -22.951900, "lon": -43.2105, "time": "2020-01-02T03:04:05-03:00"}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        assert exif_meta(photo_bytes(kind=kind, exif=exif)) == pytest.approx(expected, abs=1e-6), kind


@pytest.mark.parametrize(
    "exif",
    [
        gps_exif((0, 0, 0), "N", (0, 0, 0), "E"),
        gps_exif((91, 0, 0), "N", (5, 0, 0), "E"),
        gps_exif((45, 0, 0), "N", (181, 0, 0), "E"),
        gps_exif((45, 0, 0), "", (5, 0, 0), "E"),
        gps_exif((45, 0, 0), "N", (5, 0, 0), "E", status="V"),
        gps_exif((), "N", (5, 0, 0), "E"),
    ],
    ids=["null-island", "lat-91", "lon-181", "no-hemisphere", "void-fix", "no-value"],
)
def test_a_position_that_cannot_be_true_is_not_told(exif: Image.Exif) -> None:
    assert exif_meta(photo_bytes(exif=exif)) == {}


@pytest.mark.parametrize(
    "data", [b"", b"text", photo_bytes()[:40], b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_a_broken_photo_is_packed_as_it_is(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "broken.jpg").write_bytes(data)
    pack(tmp_path / "broken.jpg", tmp_path / "out")
    assert members(tmp_path / "out" / "000000.tar")["broken.jpg"] == data


def test_a_sidecar_wins_over_exif_and_a_position_is_never_taken_from_both(tmp_path: Path) -> None:
    exif = gps_exif((10, 0, 0), "N", (20, 0, 0), "E", time="2020:01:02 03:04:05")
    for name in ("x.90", "x.0", "y"):
        (tmp_path / "in" / f"{name}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.jpg").write_bytes(photo_bytes(exif=exif))
    (tmp_path / "in" / "x.json").write_text('{"lat": 1.5, "place": "Åbo", "n": NaN, "deep": [{"a": null}]}')
    (tmp_path / "in" / "x.0.json").write_text('{"time": "noon"}')
    (tmp_path / "in" / "y.json").write_text("[1, 2")
    summary = pack(tmp_path / "in", tmp_path / "out")
    found = metas(tmp_path / "out" / "000000.tar")
    time_taken = "2020-01-02T03:04:05"
    expected = {"path": "x.90.jpg", "lat": 1.5, "place": "Åbo", "deep": [{"a": None}], "time": time_taken}
    assert found["x.90"] == expected
    assert found["x.0"] == {"path": "x.0.jpg", "time": "noon", "lat": 10.0, "lon": 20.0}
    assert found["y"]["json"] == "[1, 2"
    assert summary.ignored == {}


def test_a_single_photo_brings_its_sidecar_and_exif_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "trip.1.jpg").write_bytes(photo_bytes(exif=gps_exif((10,), "N", (20,), "E")))
    (tmp_path / "trip.json").write_text('{"who": 7}')
    pack([tmp_path / "trip.1.jpg"], tmp_path / "out", exif=False)
    assert metas(tmp_path / "out" / "000000.tar") == {"trip.1": {"path": str(tmp_path / "trip.1.jpg"), "who": 7}}


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_photos(tmp_path / "elsewhere", "1.jpg")
    write_photos(tmp_path / "in", "0.jpg")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out")
    assert list(metas(tmp_path / "out" / "000000.tar")) == ["0", "link/1"]


def test_several_folders_keep_their_photos_apart_by_their_names(tmp_path: Path) -> None:
    write_photos(tmp_path, "a/1.jpg", "b/1.jpg", "1.jpg")
    pack([tmp_path / "a", tmp_path / "b", tmp_path / "1.jpg"], tmp_path / "out")
    assert list(metas(tmp_path / "out" / "000000.tar")) == ["a/1", "b/1", "1"]


def test_two_photos_with_one_key_stop_the_packing_and_both_are_named(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", "x/a.jpg", "x/a.png", "b.jpg")
    with pytest.raises(InputError, match=r"key 'x/a': \S*a.jpg and \S*a.png .*--duplicates rename"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_doubled_keys_are_numbered_on_request_past_names_that_are_taken(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", "a.bmp", "a.jpg", "a.png", "a~2.jpg", "b.jpg")
    pack(tmp_path / "in", tmp_path / "out", duplicates="rename")
    found = members(tmp_path / "out" / "000000.tar")
    assert [name for name in found if not name.endswith(".json")] == ["a.bmp", "a~3.jpg", "a~4.png", "a~2.jpg", "b.jpg"]
    assert found["a~3.jpg"] == photos["a.jpg"]


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_the_shards_with_the_same_keys(tmp_path: Path) -> None:
    import webdataset

    photos = write_photos(tmp_path / "in", "a/1.jpg", "a/2.jpg", "b.v1/3.jpg", "ü.jpg")
    pack(tmp_path / "in", tmp_path / "out", shard_photos=3)
    shards = [str(path) for path in sorted((tmp_path / "out").iterdir())]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["ü", "a/1", "a/2", "b.v1/3"]
    assert [sample["jpg"] for sample in samples] == [photos[f"{sample['__key__']}.jpg"] for sample in samples]
    assert json.loads(samples[1]["json"]) == {"path": "a/1.jpg"}


def test_the_stream_reads_each_photo_with_its_own_json_dots_or_not(tmp_path: Path) -> None:
    names = ["2024.05.06_1.jpg", "2024.05.06_2.jpg", "2024.jpg", "sub.v1/s..t/a..b.png", "x.jpg.png", "x.jpg"]
    photos = write_photos(tmp_path / "in", *names)
    pack(tmp_path / "in", tmp_path / "out")
    unit = Unit(index=0, kind="shard", source=str(tmp_path / "out" / "000000.tar"))
    read = list(UnitReader(unit))
    assert len(read) == len(names)
    for item in read:
        assert not isinstance(item, RowError), item
        sample, data = item
        path = json.loads(sample.meta)["path"]
        assert data == photos[path]
        assert sample.key == path.rpartition(".")[0]


def test_a_json_larger_than_readers_take_is_told_instead_of_packed(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", "a.jpg", "b.jpg")
    (tmp_path / "in" / "a.json").write_text(json.dumps({"text": "x" * (1 << 20)}))
    with pytest.raises(InputError, match=r"a\.jpg.*its json has 104\d+ bytes"):
        pack(tmp_path / "in", tmp_path / "out")
    assert pack(tmp_path / "in", tmp_path / "out", skip_missing=True).skipped == 1


def test_packing_imports_neither_torch_nor_webdataset(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", "a.jpg")
    script = "import sys; from geoloc_batch.stream.pack import pack; pack(sys.argv[1], sys.argv[2])\n"
    script += "assert not {'torch', 'webdataset'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "in", tmp_path / "out"], check=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/b.c", "a/b.c"),
        ("/data/a", "data/a"),
        ("./a", "a"),
        ("../../a/./b", "a/b"),
        ("C:\\photos\\a", "C:/photos/a"),
        ("a//b/", "a/b"),
        ("a/.hidden", "a/_hidden"),
        ("...", "___"),
        ("a\nb\0c", "a_b_c"),
        ("..", ""),
        ("osm:node:12", "osm:node:12"),
    ],
)
def test_keys_are_made_portable(name: str, key: str) -> None:
    assert portable_key(name) == key


@given(st.text(max_size=40))
def test_a_portable_key_stays_as_it_is_and_never_leaves_its_folder(name: str) -> None:
    key = portable_key(name)
    assert portable_key(key) == key
    key.encode()
    parts = key.split("/")
    assert not {"..", "."} & set(parts)
    assert not key.startswith("/")
    assert not parts[-1].startswith(".")
