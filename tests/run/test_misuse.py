"""Flags: what they do, and what is refused and how."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_world import (
    BATCH,
    World,
    draw_jpeg,
    make_head,
    make_shards,
    tree_bytes,
    write_tar,
)

from geoloc_batch.cli import main


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["embed", "--out", "x"], "no shards"),
        (["embed", "absent-*.tar", "--out", "x", "--encoder", "demo"], "absent-*.tar"),
        (["embed", "a.tar", "--out", "x", "--encoder", "./absent"], "./absent"),
        (["predict", "a.tar", "--out", "x", "--top-k", "0"], "--top-k"),
        (["predict", "a.tar", "--out", "x", "--nonsense", "0"], "--nonsense"),
        (["verify", "absent"], "absent"),
        (["status", "absent"], "absent"),
        (["nonsense"], "nonsense"),
    ],
)
def test_misuse_is_named_and_exits_with_2(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[[Sequence[str]], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.jpg", draw_jpeg(0))])
    assert word in refusal(arguments)
    assert not (tmp_path / "x").exists()


def test_another_config_on_the_same_folder_is_refused_by_the_names_that_differ(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "pred"), *world.encoder_flags, *world.head_flags]
    assert main(["predict", str(world.shards), *flags]) == 0
    before = tree_bytes(tmp_path / "pred")
    capsys.readouterr()
    assert main(["predict", str(world.shards), *flags, "--top-k", "3"]) == 2
    message = capsys.readouterr().err
    assert "top_k" in message
    assert "Traceback" not in message
    assert tree_bytes(tmp_path / "pred") == before


def test_a_head_for_other_features_is_refused_before_anything_is_written(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(world.shards), "--out", str(out), "--encoder", "demo", *world.head_flags]) == 2
    assert "48" in capsys.readouterr().err
    projected = [*world.encoder_flags, *world.head_flags, "--tap", "projected"]
    assert main(["predict", str(world.shards), "--out", str(out), *projected]) == 2
    assert "--tap pooled" in capsys.readouterr().err
    assert not out.exists()


def test_of_stored_embeddings_only_what_helps_is_said(
    world: World, geoloc: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    emb, shard = tmp_path / "emb", world.shards / "000002.tar"
    assert geoloc("embed", shard, "--out", emb, "--tap", "projected", *world.encoder_flags)[0] == 0
    stored = ["predict", "--from-embeddings", str(emb), "--out", str(tmp_path / "out"), *world.head_flags]

    assert main([*stored, "--tap", "pooled"]) == 2
    assert "the stored embeddings are 32 projected ones; embed the photos again with --tap pooled" in (
        capsys.readouterr().err
    )
    assert main([*stored, *world.encoder_flags]) == 2
    checkpoint, batch = world.encoder_flags[1], world.encoder_flags[3]
    assert f"--encoder {checkpoint}, --batch-size {batch}: no part in --from-embeddings" in capsys.readouterr().err
    assert main([*stored, "--precision", "bf16", "--compile", "off", "--fast-decode", "--decode-threads", "2"]) == 2
    message = capsys.readouterr().err
    assert "--precision bf16, --compile off, --decode-threads 2, --fast-decode: no part in" in message
    assert "leave them out" in message
    assert main([*stored, "--precision", "auto", "--batch-size", "0", "--tap", "pooled"]) == 2
    assert "projected ones" in capsys.readouterr().err
    (emb / "run.json").unlink()
    assert main([*stored, "--tap", "projected"]) == 2
    assert "pass --tap pooled if that is what they are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_head_may_move_between_two_runs(world: World, geoloc: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--out", tmp_path / "out", *world.encoder_flags]
    assert geoloc("predict", world.shards, *flags, *world.head_flags)[0] == 0
    head, cells = make_head(tmp_path / "elsewhere")
    head.write_bytes(world.head.read_bytes())
    cells.write_bytes(world.cells.read_bytes())
    assert geoloc("predict", world.shards, *flags, "--head", head)[0] == 0


def test_limit_takes_the_first_photos_in_the_order_of_the_shards(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    code, summary = geoloc("embed", world.shards, "--out", tmp_path / "emb", "--limit", 7, *world.encoder_flags)
    assert code == 0
    assert summary["rows"] == 7
    tables = [pq.read_table(path) for path in sorted((tmp_path / "emb" / "metadata").iterdir())]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert keys == ["00/0000", "00/0001", "00/0002", "00/0003", "00/0004", "01/0000", "01/0001"]


def test_the_start_of_a_run_says_which_weights_and_licence(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (world.checkpoint / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert main(["embed", str(world.shards), "--out", str(tmp_path / "emb"), *world.encoder_flags]) == 0
    (world.checkpoint / "README.md").unlink()
    weights = hashlib.sha256((world.checkpoint / "model.safetensors").read_bytes()).hexdigest()
    line = next(line for line in caplog.messages if line.startswith("encoder: "))
    assert weights[:12] in line
    assert "cc-by-nc-4.0" in line


def test_the_verbs_are_python_functions_too(world: World, tmp_path: Path) -> None:
    import geoloc_batch

    emb = geoloc_batch.embed(world.shards, out=tmp_path / "emb", encoder=world.checkpoint, batch_size=BATCH, limit=6)
    assert (emb.rows, emb.exit_code) == (6, 0)
    pred = geoloc_batch.predict(
        from_embeddings=tmp_path / "emb", out=tmp_path / "pred", head=world.head, cells=world.cells, top_k=3
    )
    assert (pred.rows, pred.exit_code) == (6, 0)
    assert geoloc_batch.verify(tmp_path / "pred").ok
    assert geoloc_batch.status(tmp_path / "pred").done == pred.units
    encoder = geoloc_batch.load_encoder(str(world.checkpoint), batch_size=2)
    head = geoloc_batch.load_head(world.head, world.cells, top_k=3)
    features = encoder.encode(torch.zeros(2, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8))
    located = head.locate(features)
    assert located.topk_cell.shape == (2, 3)
    np.testing.assert_array_equal(located.topk_cell[0], located.topk_cell[1])
    with pytest.raises(geoloc_batch.errors.ConfigError, match="stored embeddings, without an encoder; leave out"):
        geoloc_batch.retry(tmp_path / "pred", encoder="demo")
    with pytest.raises(geoloc_batch.errors.ConfigError, match="did you mean top_k"):
        geoloc_batch.predict(world.shards, out=tmp_path / "x", topk=3)


def test_a_run_goes_on_from_another_working_folder_and_calls_its_shards_as_before(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "here" / "shards", [3, 4])
    flags = ["--out", tmp_path / "out", *world.encoder_flags]
    monkeypatch.chdir(tmp_path / "here")
    assert geoloc("embed", "shards/000000.tar", *flags)[1]["rows"] == 3
    for name in ("metadata/metadata_000000.parquet", "img_emb/img_emb_000000.npy", "_done/000/000000.json"):
        (tmp_path / "out" / name).unlink()
    monkeypatch.chdir(tmp_path)
    code, summary = geoloc("embed", "here/shards", *flags)
    assert (code, summary["units"], summary["rows"]) == (0, 2, 7)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out" / "metadata").iterdir())]
    assert {shard for table in tables for shard in table["shard"].to_pylist()} == {
        "shards/000000.tar",
        "here/shards/000001.tar",
    }
    assert geoloc("verify", tmp_path / "out")[0] == 0


def test_fast_and_exact_pixels_never_mix_in_one_folder(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["embed", str(world.shards), "--out", str(tmp_path / "out"), *world.encoder_flags]
    assert main(flags) == 0
    assert main([*flags, "--fast-decode"]) == 2
    assert 'decode is pinned to "exact", now "fast"' in capsys.readouterr().err
