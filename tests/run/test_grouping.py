"""`geoloc predict --group-by`: one row for each location, from stored embeddings and from shards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from grouped_samples import DIM, NUM_CELLS, errors_of, quick_start, raw_features, write_embeddings, write_shard
from small_world import World, draw_jpeg, make_head, predictions, tree_bytes, wait_for

import geoloc_batch
from geoloc_batch.cli import main
from geoloc_batch.records import Sample, Unit, UnitEnd
from geoloc_batch.run.open_unit import OpenUnit, Outputs
from geoloc_batch.store import features as stored_features
from geoloc_batch.store import locations
from geoloc_batch.store.execution import Execution
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.goal import Goal

Geoloc = Callable[..., tuple[int, dict[str, Any]]]

PAIRS = [["a", "b", "a", "c"], ["c", None, "a", "d", "a", "a", "a", "a"], ["d", "e", "b", "c", "c"]]
COUNTS = {"a": 7, "b": 2, "c": 4, "d": 2, "e": 1}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path, _ = make_head(tmp_path_factory.mktemp("head"), num_cells=NUM_CELLS, dim=DIM)
    return ["--head", str(path)]


@pytest.fixture
def emb(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "emb", PAIRS)


@pytest.fixture
def grouped(emb: Path, head: list[str]) -> list[str]:
    return ["predict", "--from-embeddings", str(emb), *head, "--group-by", "place", "--max-error-rate", "0.2"]


def check_against_quick_start(rows: dict[str, dict[str, Any]], raw: dict[str, torch.Tensor], head: str) -> None:
    assert rows.keys() == raw.keys()
    for place, features_VD in raw.items():
        row, probs_C = rows[place], quick_start(Path(head), features_VD)
        assert row["num_views"] == len(features_VD)
        np.testing.assert_allclose(row["topk_prob"], probs_C[row["topk_cell"]], rtol=0, atol=1e-5)
        np.testing.assert_allclose(row["topk_prob"], np.sort(probs_C)[::-1][:5], rtol=0, atol=1e-5)


def test_stored_views_are_fused_as_the_quick_start_does_it(
    grouped: list[str], emb: Path, head: list[str], geoloc: Geoloc, tmp_path: Path
) -> None:
    code, summary = geoloc(*grouped, "--out", tmp_path / "out")
    assert (code, summary["samples"], summary["rows"], summary["errors"]) == (0, 17, 5, 1)
    rows = predictions(tmp_path / "out")
    assert {row["key"]: row["num_views"] for row in rows} == COUNTS
    assert [(row["key"], row["shard"], row["row"]) for row in rows][2:4] == [
        ("c", "shards/0.tar", 3), ("d", "shards/1.tar", 3),
    ]  # fmt: skip
    first = rows[0]
    assert (first["meta_place"], first["meta_town"], first["meta_heading"]) == ("a", "town of a", None)
    assert rows[-1]["meta_heading"] == 90
    assert [row["view_km"] > 0 for row in rows] == [True] * 4 + [False]
    check_against_quick_start({row["key"]: row for row in rows}, raw_features(emb), head[1])
    assert errors_of(tmp_path / "out") == [("shards/1.tar", 1, "group")]
    code, proof = geoloc("verify", tmp_path / "out")
    assert (code, proof["samples"], proof["rows"], proof["errors"]) == (0, 17, 5, 1)


def test_the_quick_starts_answer_is_missed_by_a_reader_that_forgets_the_lengths(
    grouped: list[str], emb: Path, head: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(_parquet: Path, column: Any) -> np.ndarray:
        return np.ones(len(column), dtype=np.float32)

    monkeypatch.setattr(stored_features, "_read_norms", forgetful)
    assert main([*grouped, "--out", str(tmp_path / "out")]) == 0
    rows = {row["key"]: row for row in predictions(tmp_path / "out")}
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_against_quick_start(rows, raw_features(emb), head[1])


def test_fusing_logits_is_another_answer_and_pinned(
    grouped: list[str], geoloc: Geoloc, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {fusion: tmp_path / fusion for fusion in ("feature", "logit")}
    for fusion, folder in out.items():
        assert geoloc(*grouped, "--out", folder, "--fusion", fusion)[0] == 0
    feature, logit = (predictions(out[fusion]) for fusion in ("feature", "logit"))
    assert [a["prob"] == b["prob"] for a, b in zip(feature, logit, strict=True)] == [False] * 4 + [True]
    assert main([*grouped, "--out", str(out["logit"])]) == 2
    assert "fusion" in capsys.readouterr().err


def test_where_the_views_stand_does_not_matter(
    grouped: list[str], emb: Path, head: list[str], geoloc: Geoloc, tmp_path: Path
) -> None:
    """The same photos in one pair, back to front."""
    order = np.random.default_rng(1).permutation(sum(map(len, PAIRS)))
    other = write_embeddings(tmp_path / "other", [[place for pair in PAIRS for place in pair]])
    names = ["img_emb/img_emb_{:06d}.npy", "metadata/metadata_{:06d}.parquet"]
    rows = np.concatenate([np.load(emb / names[0].format(pair)) for pair in range(3)])
    table = stored_features.pa.concat_tables([pq.read_table(emb / names[1].format(pair)) for pair in range(3)])
    np.save(other / names[0].format(0), rows[order])
    pq.write_table(table.take(order), other / names[1].format(0))
    geoloc(*grouped, "--out", tmp_path / "a")
    code, _ = geoloc("predict", "--from-embeddings", other, *head, *grouped[-4:], "--out", tmp_path / "b")
    assert code == 0
    a, b = ({row["key"]: row for row in predictions(tmp_path / out)} for out in ("a", "b"))
    assert a.keys() == b.keys()
    for place in a:
        assert a[place]["topk_cell"] == b[place]["topk_cell"]
        np.testing.assert_allclose(a[place]["topk_prob"], b[place]["topk_prob"], rtol=1e-6)
        assert a[place]["view_km"] == pytest.approx(b[place]["view_km"], rel=1e-6)


def test_a_changed_folder_is_refused_and_a_moved_one_is_not(
    grouped: list[str], emb: Path, tmp_path: Path, geoloc: Geoloc, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert geoloc(*grouped, "--out", out)[0] == 0
    before = tree_bytes(out)
    emb.rename(tmp_path / "moved")
    moved = [str(tmp_path / "moved") if word == str(emb) else word for word in grouped]
    code, summary = geoloc(*moved, "--out", out)
    assert (code, summary["rows"]) == (0, 5)
    write_embeddings(tmp_path / "moved", [*PAIRS, ["a"]])
    assert main([*moved, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "showed 5 locations by 'place'" in message
    assert "Give another --out, or the folder as it was" in message
    assert tree_bytes(out) == before


def test_an_unfinished_folder_gives_nothing_yet(
    world: World, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = tmp_path / "shards"
    for index in range(2):
        write_shard(shards / f"{index}.tar", ["a", "b", "a"], first_photo=3 * index)
    emb = tmp_path / "emb"
    assert geoloc("embed", shards, "--out", emb, *world.encoder_flags)[0] == 0
    (emb / "_done" / "000" / "000001.json").rename(tmp_path / "000001.json")
    command = ["predict", "--from-embeddings", emb, "--group-by", "place", "--out", tmp_path / "out", *world.head_flags]
    assert geoloc(*command)[0] == 75
    assert "1 of its units are missing" in caplog.text
    assert not (tmp_path / "out").exists()
    (tmp_path / "000001.json").rename(emb / "_done" / "000" / "000001.json")
    code, summary = geoloc(*command)
    assert (code, summary["rows"], summary["samples"]) == (0, 2, 6)
    assert [row["num_views"] for row in predictions(tmp_path / "out")] == [4, 2]


def test_views_that_the_head_cannot_place_are_refused_alone(emb: Path, geoloc: Geoloc, tmp_path: Path) -> None:
    path, _ = make_head(tmp_path / "wild", num_cells=NUM_CELLS, dim=DIM)
    state = torch.load(path, weights_only=True)
    weight = state["model"]["head.2.weight"]
    state["model"]["head.2.weight"] = torch.where(weight > 0, 3e37, -3e37)
    torch.save(state, path)
    flags = ["--head", path, "--from-embeddings", emb]
    geoloc("predict", *flags, "--out", tmp_path / "photos")
    code, summary = geoloc("predict", *flags, "--group-by", "place", "--out", tmp_path / "out")
    assert code == 3
    assert summary["samples"] == 17
    refused = {error[:2] for error in errors_of(tmp_path / "out") if error[2] == "locate"}
    alone = {error[:2] for error in errors_of(tmp_path / "photos")} - {("shards/1.tar", 1)}
    assert 0 < len(alone) < 16
    assert alone <= refused
    rows = predictions(tmp_path / "out")
    assert sum(row["num_views"] for row in rows) == 16 - len(refused)
    assert any(0 < row["num_views"] < COUNTS[row["key"]] for row in rows)
    assert geoloc("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a.tar", "--out", "x", "--fusion", "logit"], "--fusion logit was given without --group-by"),
        (["photo.jpg", "--group-by", "place"], "none of the photos has a json beside it"),
        (["photo.jpg", "--out", "x", "--group-by", "place"], "what is known of them is path. Name one of these"),
        (["a.tar", "--out", "x", "--combine", "--head", "best.pt"], "--combine needs at least two heads, got 1"),
        (["--from-embeddings", "emb", "--out", "x", "--group-by", "plaza"], "there are heading, place, town"),
    ],
)
def test_misuse_is_named(
    flags: list[str], words: str, emb: Path, head: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[[Sequence[str]], str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(draw_jpeg(0))
    write_shard(Path("a.tar"), ["a"])
    shutil.copytree(Path(head[1]).parent, ".", dirs_exist_ok=True)
    encoder = ["--encoder", "demo"] if "photo.jpg" in flags else []
    assert words in refusal(["predict", *flags, *encoder, *([] if "--head" in flags else head)])
    assert not Path("x").exists()


def test_the_order_in_which_photos_come_does_not_show(head: list[str], tmp_path: Path) -> None:
    locator = geoloc_batch.load_head(head[1], Path(head[1]).parent / "geocell_info.json")
    unit = Unit(index=0, kind="shard", source="0.tar")
    places = ["a", "b", "a", "c", "b", "a", "a"]
    samples = [Sample(unit, "0.tar", row, str(row), f'{{"place": "{p}"}}'.encode()) for row, p in enumerate(places)]
    features = np.random.default_rng(0).normal(size=(len(places), DIM)).astype(np.float32)
    written = []
    for turn, order in enumerate([[0, 1, 2, 3, 4, 5, 6], [6, 2, 5, 0, 1, 4, 3]]):
        execution = Execution(unit, Goal(0), "token", 1, tmp_path / str(turn), OsFiles())
        opened = OpenUnit(execution, [])
        for part in (order[:4], order[4:]):
            opened.add([samples[row] for row in part], features[part], [])
        opened.end = UnitEnd(unit, len(places))
        assert opened.group("place", [locator]) == 0
        paths = opened.write(Outputs(embeddings=True, trees=("",), group_by="place"))
        written.append({path: execution.stage(path).read_bytes() for path in paths})
    assert written[0] == written[1]
    assert len(written[0]) == 3


def test_from_python_and_several_heads_and_a_retry(emb: Path, head: list[str], tmp_path: Path, geoloc: Geoloc) -> None:
    other, _ = make_head(tmp_path / "other", num_cells=11, dim=DIM, seed=5)
    heads, out = [f"one={head[1]}", str(other)], tmp_path / "two"
    given = {"from_embeddings": emb, "head": heads, "group_by": "place", "max_error_rate": 1.0}
    summary = geoloc_batch.predict(out=out, fusion="logit", **given)
    assert (summary.exit_code, summary.rows, summary.samples) == (0, 5, 17)
    assert [len(predictions(out, tree)) for tree in ("one", "other")] == [5, 5]
    before = tree_bytes(out)
    assert geoloc("retry", out, "--unit", "0")[0] == 0
    assert tree_bytes(out) == before
    assert geoloc("verify", out)[0] == 0
    combined = geoloc_batch.predict(out=tmp_path / "combined", combine=True, **given)
    assert (combined.exit_code, combined.rows) == (0, 5)
    rows = predictions(tmp_path / "combined")
    assert [row["num_views"] for row in rows] == list(COUNTS.values())
    assert max(cell for row in rows for cell in row["topk_cell"]) >= 11
    single = geoloc_batch.predict(out=tmp_path / "single", limit=3, **given | {"head": heads[:1]})
    assert (single.samples, single.rows) == (3, 2)


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_give_the_bytes_of_an_undisturbed_run(
    head: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    places = [[f"p{n}" if n else None for n in rng.integers(0, 60, 40).tolist()] for _ in range(6)]
    emb, cut, whole = write_embeddings(tmp_path / "emb", places), tmp_path / "cut", tmp_path / "whole"
    words = ["predict", "--from-embeddings", str(emb), "--group-by", "place", *head, "--max-error-rate", "1"]
    # Units of few views, and slow ones, so that there is a time to be killed in.
    script = (
        "import sys, time\n"
        "from geoloc_batch.store import locations\n"
        "from geoloc_batch.run.location_source import LocationSource\n"
        "locations.BUCKET_VIEWS = 12\n"
        "views = LocationSource._views\n"
        "LocationSource._views = lambda self, unit: (time.sleep(0.2), views(self, unit))[1]\n"
        "from geoloc_batch.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, *words, "--out", str(cut)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, **quiet) as rank:  # type: ignore[call-overload]
        monkeypatch.setattr(locations, "BUCKET_VIEWS", 12)
        assert main([*words, "--out", str(whole)]) == 0
        wait_for(lambda: len(list((cut / "_done").rglob("*.json"))) >= 2, rank)
        killer = threading.Timer(0.3, rank.kill)
        killer.start()
        assert main([*words, "--out", str(cut)]) == 0
        killer.join()
    assert rank.returncode == -signal.SIGKILL
    assert tree_bytes(cut) == tree_bytes(whole)
    assert len(list((whole / "predictions").iterdir())) > 10
    assert main(["verify", str(cut)]) == 0
    check_against_quick_start({row["key"]: row for row in predictions(whole)}, raw_features(emb), head[1])
