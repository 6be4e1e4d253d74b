"""`geoloc predict` on photos instead of shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_world import World, draw_jpeg, make_head, make_shards, predictions

import geoloc_batch
from geoloc_batch.cli import main
from geoloc_batch.run import photos as locating
from geoloc_batch.stream import pack as packing


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    head, _ = make_head(tmp_path_factory.mktemp("head"), dim=192)
    return ["--encoder", "demo", "--head", str(head)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.jpg").write_bytes(draw_jpeg(ord(name)))
    return folder


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_glob_of_photos_is_a_table_of_photos(
    photos: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", f"{photos}/[ab].jpg", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].endswith(("a.jpg", "b.jpg")) for line in lines[1:-1]] == [True, True]


def test_photos_that_cannot_be_read_or_decoded_stand_in_the_table(
    photos: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "text.jpg").write_text("no photo")
    assert main(["predict", str(photos), *flags]) == 3
    *lines, summary = capsys.readouterr().out.splitlines()
    assert {"samples": 5, "rows": 3, "errors": 2}.items() <= json.loads(summary).items()
    assert any("gone.jpg" in line and "read: No such file" in line for line in lines)
    assert any("text" in line and "decode: " in line for line in lines)


def test_photos_and_shards_are_told_apart_or_refused(
    photos: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_shards(tmp_path / "shards", [2])[0]
    out = ["--out", str(tmp_path / "out")]
    assert main(["predict", f"pipe:cat {shard}; echo >/dev/null a.jpg", *out, *flags]) == 0
    assert last_json(capsys)["rows"] == 2
    for inputs in ([str(photos), str(shard)], [str(shard), str(photos)], [f"{photos}/*.jpg", str(shard.parent)]):
        assert main(["predict", *inputs, *flags, *out]) == 2
        message = capsys.readouterr().err
        assert "one command for the photos, one for the shards" in message
        assert str(photos) in message
        assert str(shard.parent) in message
    (photos / "000000.tar").write_bytes(shard.read_bytes())
    assert main(["predict", str(photos), *flags]) == 2
    assert "holds shards (000000.tar) and photos" in capsys.readouterr().err


def test_a_long_table_is_cut_after_photos_and_shows_every_head_of_each(
    photos: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, _ = make_head(tmp_path / "other", dim=192, seed=1)
    monkeypatch.setattr(locating, "MAX_SHOWN", 2)
    assert main(["predict", str(photos), *flags, "--head", str(other), "--out", str(tmp_path / "out")]) == 0
    _, *rows, more, _ = capsys.readouterr().out.splitlines()
    shown = [(Path(row.split()[0]).name, row.split()[-1]) for row in rows]
    heads = [shown[0][1], "other"]
    assert shown == [(name, head) for name in ("a.jpg", "b.jpg") for head in heads]
    assert more == "... and 1 more; all of them are in the predictions of --out"
    assert main(["predict", str(photos), *flags]) == 0
    assert "... and 1 more; pass --out to keep all of them" in capsys.readouterr().out


def test_a_photo_that_is_given_twice_counts_twice(
    photos: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *[str(photos / "a.jpg")] * 2, *flags]) == 0
    _, first, second, _ = capsys.readouterr().out.splitlines()
    assert "a.jpg" in first
    assert first == second


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "a name among the inputs is empty; give photos"),
        ("README", "README does not exist"),
        ("gone.jpg", "gone.jpg does not exist"),
        ("gone-*.jpg", "gone-*.jpg matches no photo"),
    ],
)
def test_what_is_not_there_is_told_before_a_missing_out(
    given: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", given]) == 2
    assert f"error: {words}" in capsys.readouterr().err


def test_photos_added_since_they_were_packed_are_not_ignored_in_silence(
    photos: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(photos), "--out", str(tmp_path / "out"), *flags]
    assert main(command) == 0
    assert main(command) == 0
    (photos / "d.jpg").write_bytes(draw_jpeg(4))
    assert main(command) == 2
    assert "other photos" in capsys.readouterr().err


def test_a_packing_that_was_killed_is_done_again(
    photos: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(_folder: object) -> None:
        raise KeyboardInterrupt

    command = ["predict", str(photos), "--out", str(tmp_path / "out"), *flags]
    with monkeypatch.context() as broken:
        broken.setattr(packing.StagedFolder, "publish", killed)
        assert main(command) == 75
    assert main(command) == 0
    assert last_json(capsys)["rows"] == 3


def test_the_python_function_takes_photos_too(photos: Path, flags: list[str]) -> None:
    summary = geoloc_batch.predict(photos / "a.jpg", encoder="demo", head=flags[3])
    assert (summary.rows, summary.exit_code, summary.out) == (1, 0, "")
    (place,) = summary.places
    assert place.photo.endswith("a.jpg")
    assert -90 <= place.lat <= 90
    assert 0 < place.prob <= 1


def test_a_photo_is_located_without_an_output_folder(
    world: World, real_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = real_photos[-1]
    assert main(["predict", str(photo), *world.encoder_flags, *world.head_flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(photo.name in line for line in lines[:-1])
    assert json.loads(lines[-1])["rows"] == 1


def test_a_folder_of_photos_with_an_output_folder_keeps_its_rows_and_refuses_other_photos(
    world: World, real_photos: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, flags = tmp_path / "out", [*world.encoder_flags, *world.head_flags]
    assert main(["predict", str(real_photos[-1].parent), "--out", str(out), *flags]) == 0
    rows = predictions(out)
    assert len(rows) == 22
    assert main(["predict", str(real_photos[-1].parent), "--out", str(out), *flags]) == 0
    assert predictions(out) == rows
    assert main(["predict", str(real_photos[0].parent), "--out", str(out), *flags]) == 2
    assert "inputs" in capsys.readouterr().err
    assert predictions(out) == rows


def test_photos_are_not_packed_into_a_folder_of_something_else(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(draw_jpeg(0))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    flags = ["--out", str(tmp_path / "home"), *world.encoder_flags, *world.head_flags]
    assert main(["predict", str(tmp_path / "photo.jpg"), *flags]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_photos_and_shards_together_are_misuse(world: World, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(draw_jpeg(0))
    shard = make_shards(tmp_path / "shards", [1])[0]
    flags = [*world.encoder_flags, *world.head_flags]
    assert main(["predict", str(tmp_path / "photo.jpg"), str(shard), *flags]) == 2
