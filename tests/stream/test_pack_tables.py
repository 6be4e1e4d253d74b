"""Packing CSV and Parquet: columns, types, bytes and paths, and rows that cannot be packed."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_samples import gps_exif, members, metas, photo_bytes, write_photos

from geoloc_batch.errors import InputError
from geoloc_batch.stream.pack import pack


def _csv(folder: Path, text: str, name: str = "list.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


def _parquet(folder: Path, columns: dict[str, Any], name: str = "list.parquet") -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def test_a_csv_gives_its_columns_to_the_json_typed_by_the_whole_column(tmp_path: Path) -> None:
    photos = write_photos(tmp_path, "p/1.jpg", "p/2.jpg", "p/3.jpg")
    text = "path,lat,lon,zip,count,seen,note\n"
    text += 'p/1.jpg,48.5,-3.25,01234,7,true,"a, ""b"""\np/2.jpg,1e1,nan,99999,,FALSE,\np/3.jpg,.5,5,1,-2,true,nan\n'
    summary = pack(_csv(tmp_path, text), tmp_path / "out")
    found = members(tmp_path / "out" / "000000.tar")
    assert found["p/2.jpg"] == photos["p/2.jpg"]
    assert [json.loads(found[f"p/{number}.json"]) for number in (1, 2, 3)] == [
        {"path": "p/1.jpg", "lat": 48.5, "lon": -3.25, "zip": "01234", "count": 7, "seen": True, "note": 'a, "b"'},
        {"path": "p/2.jpg", "lat": 10.0, "zip": "99999", "seen": False},
        {"path": "p/3.jpg", "lat": 0.5, "lon": 5.0, "zip": "1", "count": -2, "seen": True, "note": "nan"},
    ]
    assert summary.photos == 3


@pytest.mark.parametrize(("name", "separator", "encoding"), [("l.csv", ";", "utf-8-sig"), ("l.tsv", "\t", "utf-8")])
def test_a_semicolon_a_tab_and_a_byte_order_mark_are_read(
    tmp_path: Path, name: str, separator: str, encoding: str
) -> None:
    write_photos(tmp_path, "a.jpg")
    table = _csv(tmp_path, f"path{separator}wo\r\na.jpg{separator}Malmö, Ö\r\n\r\n", name, encoding)
    pack(table, tmp_path / "out")
    assert metas(tmp_path / "out" / "000000.tar") == {"a": {"path": "a.jpg", "wo": "Malmö, Ö"}}


def test_a_key_column_names_the_photos_and_a_key_that_was_changed_is_kept(tmp_path: Path) -> None:
    write_photos(tmp_path, "a.jpg", "b.jpg")
    table = _csv(tmp_path, "path,id,key\na.jpg,007,x\nb.jpg,../8,y\n")
    pack(table, tmp_path / "by-key")
    assert list(metas(tmp_path / "by-key" / "000000.tar")) == ["x", "y"]
    pack(table, tmp_path / "by-id", key_column="id")
    assert metas(tmp_path / "by-id" / "000000.tar") == {
        "007": {"path": "a.jpg", "key": "x"},
        "8": {"path": "b.jpg", "key": "y", "original_key": "../8"},
    }


def test_paths_may_be_absolute_climb_or_come_from_windows(tmp_path: Path) -> None:
    write_photos(tmp_path, "lists/in/1.jpg", "other/2.jpg", "lists/in/3.jpg", "lists/4.jpg")
    inside, outside = tmp_path / "lists" / "in" / "1.jpg", tmp_path / "other" / "2.jpg"
    rows = [inside.as_posix(), outside.as_posix(), "in\\3.jpg", "./../lists/4.jpg"]
    pack(_csv(tmp_path / "lists", "path\n" + "\n".join(rows)), tmp_path / "out")
    found = metas(tmp_path / "out" / "000000.tar")
    assert list(found) == ["in/1", outside.with_suffix("").as_posix().lstrip("/"), "in/3", "lists/4"]
    assert [meta["path"] for meta in found.values()] == rows


def test_the_tables_position_stands_above_exif(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(photo_bytes(exif=gps_exif((10,), "N", (20,), "E")))
    pack(_csv(tmp_path, "path,lat,lon\na.jpg,1,2\nb.jpg,,\n"), tmp_path / "out")
    found = metas(tmp_path / "out" / "000000.tar")
    assert (found["a"]["lat"], found["a"]["lon"]) == (1, 2)
    assert "lat" not in found["b"]


def test_a_missing_photo_stops_the_packing_before_anything_is_written(tmp_path: Path) -> None:
    write_photos(tmp_path, "a.jpg")
    (tmp_path / "folder.jpg").mkdir()
    table = _csv(tmp_path, 'path\na.jpg\nabsent.jpg\nfolder.jpg\n""\nhttp://x/y.jpg\n')
    with pytest.raises(InputError) as caught:
        pack(table, tmp_path / "out")
    assert "4 of 5 photos cannot be read" in str(caught.value)
    assert "line 3: 'absent.jpg' (No such file or directory)" in str(caught.value)
    assert "--skip-missing" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_photos_are_skipped_on_request_and_listed(tmp_path: Path) -> None:
    write_photos(tmp_path, "a.jpg", "b.jpg")
    table = _csv(tmp_path, 'path\nabsent.jpg\na.jpg\n""\nb.jpg\n')
    summary = pack(table, tmp_path / "out", skip_missing=True)
    assert (summary.photos, summary.skipped) == (2, 2)
    assert list(metas(tmp_path / "out" / "000000.tar")) == ["a", "b"]
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"where": f"{table}, line 2", "path": "absent.jpg", "reason": "No such file or directory"},
            {"where": f"{table}, line 4", "path": "", "reason": "Neither a path nor bytes"},
        ]
    with pytest.raises(InputError, match="none of the 1 photos can be read"):
        pack(_csv(tmp_path, "path\nabsent.jpg\n"), tmp_path / "none", skip_missing=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,lat\na.jpg,1\n", "no column 'path'.*file, lat.*--path-column"),
        ("path,path\na.jpg,b\n", "two columns named 'path'"),
        ("path,a\na.jpg,1,2\n", "line 2 has 3 values for 2 columns"),
        ('path\n"a.jpg\n', "cannot be read as CSV"),
        ("", "no column 'path'"),
        ("path,key\na.jpg,..\n", "line 2: the key '..' names nothing"),
        ("path,key\na.jpg\n", "line 2: the key '' names nothing"),
    ],
)
def test_a_csv_that_cannot_be_read_is_named_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    write_photos(tmp_path, "a.jpg")
    with pytest.raises(InputError, match=expected):
        pack(_csv(tmp_path, text), tmp_path / "out")


def test_a_csv_in_another_encoding_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save it as UTF-8"):
        pack(_csv(tmp_path, "path\nå.jpg\n", encoding="latin-1"), tmp_path / "out")


def test_a_parquet_of_paths_keeps_its_types(tmp_path: Path) -> None:
    write_photos(tmp_path, "a.jpg", "b.jpg")
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 250_000, tzinfo=datetime.UTC)
    columns = {
        "path": ["a.jpg", "b.jpg"],
        "lat": [1.5, float("nan")],
        "n": pa.array([2**53 + 1, None], pa.int64()),
        "when": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "day": [datetime.date(2024, 5, 6), None],
        "tags": [["x", "y"], []],
        "box": [{"w": 1.5}, None],
        "kind": pa.array(["old", "new"]).dictionary_encode(),
        "mask": [b"\0\1", b""],
    }
    summary = pack(_parquet(tmp_path, columns), tmp_path / "out")
    assert metas(tmp_path / "out" / "000000.tar") == {
        "a": {
            "path": "a.jpg",
            "lat": 1.5,
            "n": 2**53 + 1,
            "when": "2024-05-06T07:08:09.250000+00:00",
            "day": "2024-05-06",
            "tags": ["x", "y"],
            "box": {"w": 1.5},
            "kind": "old",
        },
        "b": {"path": "b.jpg", "tags": [], "kind": "new"},
    }
    assert summary.ignored == {"column mask": 1}


def test_a_parquet_of_bytes_is_named_by_row_and_told_apart_by_its_bytes(tmp_path: Path) -> None:
    kinds = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"]
    photos = [photo_bytes(number, kind) for number, kind in enumerate(kinds)]
    table = _parquet(tmp_path, {"image_bytes": [*photos, b"no photo"], "place": list("abcdefg")})
    pack(table, tmp_path / "out")
    found = members(tmp_path / "out" / "000000.tar")
    names = [name for name in found if not name.endswith(".json")]
    extensions = ["jpg", "png", "webp", "tif", "bmp", "avif", "jpg"]
    assert names == [f"{number:09d}.{extension}" for number, extension in enumerate(extensions)]
    assert [found[name] for name in names] == [*photos, b"no photo"]
    assert json.loads(found["000000002.json"]) == {"place": "c"}


def test_hugging_faces_struct_of_bytes_and_path_is_read(tmp_path: Path) -> None:
    write_photos(tmp_path, "on-disk.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        {"bytes": photo_bytes(1), "path": "far/away.jpg"},
        {"bytes": photo_bytes(2, "PNG"), "path": None},
        {"bytes": None, "path": "on-disk.png"},
    ]
    pack(_parquet(tmp_path, {"image": pa.array(cells, kind), "label": [3, 4, 5]}), tmp_path / "out")
    found = members(tmp_path / "out" / "000000.tar")
    assert {name: json.loads(data) for name, data in found.items() if name.endswith(".json")} == {
        "far/away.json": {"path": "far/away.jpg", "label": 3},
        "000000001.json": {"label": 4},
        "on-disk.json": {"path": "on-disk.png", "label": 5},
    }
    assert found["far/away.jpg"] == cells[0]["bytes"]
    assert found["000000001.png"] == cells[1]["bytes"]
    assert found["on-disk.png"] == (tmp_path / "on-disk.png").read_bytes()


def test_a_row_without_bytes_is_an_error_or_skipped_and_nothing_is_left_half_done(tmp_path: Path) -> None:
    table = _parquet(tmp_path, {"image": [photo_bytes(), None], "key": ["a", "b"]})
    with pytest.raises(InputError, match=r"row 1: .*Neither a path nor bytes.*--skip-missing"):
        pack(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pack(table, tmp_path / "out", skip_missing=True).skipped == 1


def test_rows_of_several_tables_are_numbered_through(tmp_path: Path) -> None:
    first = _parquet(tmp_path, {"image": [photo_bytes(1), photo_bytes(2)]}, "train-0.parquet")
    second = _parquet(tmp_path, {"image": [photo_bytes(3)]}, "train-1.parquet")
    pack([first, second], tmp_path / "out")
    assert list(metas(tmp_path / "out" / "000000.tar")) == ["000000000", "000000001", "000000002"]


def test_keys_that_stand_twice_in_a_table_are_named(tmp_path: Path) -> None:
    table = _parquet(tmp_path, {"image": [photo_bytes()] * 3, "key": [5, 6, 5]})
    with pytest.raises(InputError, match=r"key '5': \S*, row 0 and \S*, row 2"):
        pack(table, tmp_path / "out")
    pack(table, tmp_path / "out", duplicates="rename")
    assert list(metas(tmp_path / "out" / "000000.tar")) == ["5", "6", "5~2"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"key_column": "id"}, "no column 'id' for --key-column; it has image, n"),
        ({"image_column": "n"}, "no column 'n' of image bytes; it has image, n"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path: Path, settings: dict[str, str], expected: str) -> None:
    table = _parquet(tmp_path, {"image": [photo_bytes()], "n": [1]})
    with pytest.raises(InputError, match=expected):
        pack(table, tmp_path / "out", **settings)


def test_a_parquet_without_photos_or_with_broken_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'path', nor one of image bytes"):
        pack(_parquet(tmp_path, {"lat": [1.0]}), tmp_path / "out")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        pack(tmp_path / "broken.parquet", tmp_path / "out")
