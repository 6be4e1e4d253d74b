"""`geoloc retry OUT`: what ended with an error is executed once more, and nothing good is lost by it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_world import World, draw_jpeg, make_head, predictions, tree_bytes, write_tar

from geoloc_batch import retry
from geoloc_batch.cli import main

Geoloc = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def shards(world: World, tmp_path: Path) -> Path:
    """Shards of one's own, to be changed."""
    shutil.copytree(world.shards, tmp_path / "shards")
    return tmp_path / "shards"


def listed(shards: Path) -> list[str]:
    """Three files, and a fourth through a pipe that fails while a mount is not there."""
    mount = shards / "mount" / "000003.tar"
    return [*(str(shards / f"{index:06d}.tar") for index in range(3)), f"pipe:cat '{mount}'"]


def mend(shards: Path) -> None:
    (shards / "mount").mkdir()
    shutil.copy(shards / "000003.tar", shards / "mount")


def test_a_retry_gives_what_an_undisturbed_run_gives(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*world.encoder_flags, *world.head_flags, "--save-embeddings"]
    code, before = geoloc("predict", *listed(shards), "--out", tmp_path / "out", *flags)
    assert (code, before["unit_errors"], before["rows"]) == (3, 1, 15)
    assert geoloc("status", tmp_path / "out")[1]["retryable"] == 1

    caplog.set_level(logging.INFO)
    assert geoloc("retry", tmp_path / "out")[0] == 3
    assert "retrying 1 units" in caplog.text
    mend(shards)
    code, after = geoloc("retry", tmp_path / "out")

    assert (code, after["unit_errors"], after["rows"], after["units"]) == (0, 0, 27, 4)
    assert geoloc("verify", tmp_path / "out")[0] == 0
    assert geoloc("status", tmp_path / "out")[1]["retryable"] == 0
    geoloc("predict", *listed(shards), "--out", tmp_path / "undisturbed", *flags)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "undisturbed")
    # The command that made it finds everything done.
    assert geoloc("predict", *listed(shards), "--out", tmp_path / "out", *flags)[1]["rows"] == 27


def test_a_shard_whose_sender_breaks_off_is_published_whole_by_a_retry_or_not_at_all(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path
) -> None:
    mend(shards)
    tar = shards / "mount" / "000003.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"

    code, summary = geoloc("embed", *listed(shards), "--out", out, *world.encoder_flags)

    # Half of its photos came; a file cut like that would have kept them.
    assert (code, summary["rows"], summary["samples"], summary["unit_errors"]) == (3, 15, 15, 1)
    assert not (out / "img_emb" / "img_emb_000003.npy").exists()
    assert geoloc("verify", out)[0] == 0
    tar.write_bytes(whole)
    code, summary = geoloc("retry", out)
    assert (code, summary["rows"], summary["unit_errors"]) == (0, 27, 0)


def test_a_retry_that_reads_less_keeps_the_rows_and_says_so(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = shards / "000001.tar"
    geoloc("embed", tar, "--out", tmp_path / "out", *world.encoder_flags)
    before = tree_bytes(tmp_path / "out")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])

    code, summary = geoloc("retry", tmp_path / "out", "--unit", 0)

    # What was named was not made again: no success, though nothing is worse than before.
    assert (code, summary["rows"], summary["unit_errors"], summary["kept"]) == (3, 9, 0, 1)
    assert "its retry gave nothing better (the archive is cut" in caplog.text
    assert "what stood stays" in caplog.text
    assert tree_bytes(tmp_path / "out") == before
    assert geoloc("verify", tmp_path / "out")[0] == 0


def test_a_retry_that_reads_no_photo_keeps_the_rows_and_one_that_reads_fewer_says_so(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar, out = shards / "000001.tar", tmp_path / "out"
    geoloc("embed", tar, "--out", out, *world.encoder_flags)
    write_tar(tar, [("readme.txt", b"the wrong tar")])
    assert geoloc("retry", out, "--unit", 0)[1]["rows"] == 9
    write_tar(tar, [("a.jpg", b"no photo"), ("b.jpg", b"none either")])
    assert geoloc("retry", out, "--unit", 0)[1]["rows"] == 9

    write_tar(tar, [("a.jpg", draw_jpeg(1)), ("b.jpg", draw_jpeg(2))])
    code, summary = geoloc("retry", out, "--unit", 0)

    assert (code, summary["rows"], summary["kept"]) == (0, 2, 0)
    assert "it had 9 rows before its retry and has 2 now" in caplog.text
    assert geoloc("verify", out)[0] == 0


def test_units_that_were_never_done_are_told_apart_from_retried_ones(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    geoloc("embed", shards, "--out", tmp_path / "out", *world.encoder_flags)
    for path in (tmp_path / "out" / "_done" / "000").glob("00000[23].json"):
        path.unlink()

    assert geoloc("retry", tmp_path / "out")[0] == 75

    assert "2 units of " in caplog.text
    assert "were never done: run the command that made it again" in caplog.text


def test_a_folder_named_as_an_encoder_does_not_mislead_a_retry(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert geoloc("embed", "shards/000000.tar", "--out", "demo", "--encoder", "demo")[0] == 0
    assert geoloc("retry", "demo", "--unit", 0)[0] == 0


def test_photos_that_could_not_be_packed_count_in_a_retry_too(world: World, geoloc: Geoloc, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.jpg").write_bytes(draw_jpeg(number))
    (photos / "empty.jpg").write_bytes(b"")
    flags = [*world.encoder_flags, *world.head_flags]
    code, before = geoloc("predict", photos, "--out", tmp_path / "out", *flags)
    again, after = geoloc("retry", tmp_path / "out")
    assert (code, before["samples"], before["errors"]) == (again, after["samples"], after["errors"])


def test_a_damaged_shard_is_made_again_from_a_sound_copy(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path
) -> None:
    tar = shards / "000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    assert geoloc("predict", shards, "--out", out, *world.encoder_flags, *world.head_flags)[0] == 3
    tar.write_bytes(whole)
    # A cut tar is no matter of another try: it must be named.
    assert geoloc("retry", out)[1]["unit_errors"] == 1

    code, summary = geoloc("retry", out, "--unit", 1)

    assert (code, summary["unit_errors"], summary["rows"]) == (0, 0, 27)
    assert len(predictions(out)) == 27


def test_a_harmed_file_is_made_again(world: World, shards: Path, geoloc: Geoloc, tmp_path: Path) -> None:
    out = tmp_path / "out"
    geoloc("embed", shards, "--out", out, *world.encoder_flags)
    before = tree_bytes(out)
    (out / "img_emb" / "img_emb_000001.npy").write_bytes(b"harmed")
    (out / "metadata" / "metadata_000003.parquet").unlink()
    assert geoloc("verify", out)[0] == 1

    assert geoloc("retry", out, "--unit", 1, "--unit", 3)[0] == 0

    assert geoloc("verify", out)[0] == 0
    assert tree_bytes(out) == before


def test_a_retry_works_from_any_folder_and_finds_what_was_moved(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    head, cells = make_head(tmp_path / "head")
    monkeypatch.chdir(tmp_path)
    pipe = "pipe:cat " + str(shards / "mount" / "000003.tar")
    flags = ["--head", "one=head/best.pt", "--cells", "head/geocell_info.json", *world.encoder_flags]
    assert geoloc("predict", "shards/000001.tar", pipe, "--out", "out", *flags)[0] == 3
    mend(shards)
    monkeypatch.chdir(tmp_path / "elsewhere")

    shutil.move(cells, tmp_path / "elsewhere")
    assert geoloc_fails("retry", tmp_path / "out") == 2
    summary = retry(tmp_path / "out", cells="geocell_info.json")

    assert (summary.exit_code, summary.rows) == (0, 21)
    assert head.exists()


def test_embeddings_that_came_back_are_located_by_a_retry(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path
) -> None:
    emb, out = tmp_path / "emb", tmp_path / "out"
    geoloc("embed", shards, "--out", emb, *world.encoder_flags)
    pair = emb / "metadata" / "metadata_000002.parquet"
    good = pair.read_bytes()
    pair.write_bytes(b"not yet copied")
    assert geoloc("predict", "--from-embeddings", emb, "--out", out, *world.head_flags)[1]["rows"] == 26
    pair.write_bytes(good)

    code, summary = geoloc("retry", out)

    assert (code, summary["rows"]) == (0, 27)


def geoloc_fails(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_what_cannot_be_retried_is_said(
    world: World, shards: Path, geoloc: Geoloc, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert geoloc_fails("retry", out) == 2
    assert "is not an output folder of geoloc" in capsys.readouterr().err
    geoloc("embed", shards / "000000.tar", "--out", out, *world.encoder_flags)
    assert geoloc_fails("retry", out, "--unit", 7) == 2
    assert "there is none" in capsys.readouterr().err
    assert geoloc_fails("retry", out, "--head", world.head) == 2
    assert "has no heads" in capsys.readouterr().err
    assert geoloc_fails("retry", out, "--encoder", "demo") == 2
    assert "belongs to a run with another config" in capsys.readouterr().err
    for text in (json.dumps({"command": "embed"}), "[" * 100_000):
        (out / "_logs" / "command.json").write_text(text)
        assert geoloc_fails("retry", out) == 2
        assert "run the command that made it once more" in capsys.readouterr().err
