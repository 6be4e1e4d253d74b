"""`geoloc train` refuses what it cannot use before it writes anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from train_samples import DIM, NUM_CELLS, World, flags_of, make_world, write_photos

from geoloc_batch.cli import main
from geoloc_batch.geo.partition import Partition
from geoloc_batch.locate.head_file import TENSORS, save_head


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--group-by", "town"], ["'town'", "spot", "--group-by"]),
        (["--lat", "breite"], ["'breite'", "lat"]),
        (["--loss", "ce", "--loss", "smooth"], ["--loss was given 2 times", "--sweep"]),
        (["--loss", "ce", "--lam", 0.01], ["--lam 0.01", "--loss ce", "leave it out"]),
        (["--fusion", "logit"], ["--fusion logit", "--group-by"]),
        (["--view-dropout", 0.2], ["--view-dropout 0.2", "--group-by"]),
        (["--epochs", 0], ["--epochs", "at least 1", "0"]),
        (["--lr", 0], ["--lr", "above 0"]),
        (["--dropout", 0.995], ["--dropout", "0 to 0.99", "0.995"]),
        (["--group-by", "spot", "--view-dropout", 1], ["--view-dropout", "0 to 0.99"]),
        (["--loss", "smooth", "--tau-km", 0.0009], ["--tau-km", "at least 0.001", "0.0009"]),
        (["--split-file", "a.csv", "--shares", 0.5, 0.3, 0.2], ["--shares 0.5 0.3 0.2 has no part", "a.csv", "leave"]),
        (["--split-file", "a.csv", "--split-seed", 3], ["--split-seed 3 has no part", "a.csv", "leave"]),
        (["--split-file", "a.csv", "--shares", 0.8, 0.1, 0.1], ["a.csv cannot be read"]),
        (["--shares", 0.5, 0.5, 0.5], ["--shares", "0.5 0.5 0.5", "0.8 0.1 0.1"]),
        (["--buffer-km", 5], ["--buffer-km 5", "--block-km"]),
        (["--seed", -1], ["--seed", "-1"]),
        (["--split-file", "absent.csv"], ["absent.csv"]),
        (["--truth", "absent.csv"], ["absent.csv", "--truth"]),
        (["--warm-start", "absent.pt"], ["absent.pt"]),
        (["--warm-start", "other.pt"], ["other.pt", "5 cells", "9", "--cells"]),
        (["--warm-start", "narrow.pt"], ["narrow.pt", "7 pooled", "24 pooled"]),
        (["--cells", "one.json"], ["one.json", "one cell"]),
        (["--cells", "gap.json"], ["gap.json", "0 to 2", "renumber"]),
        (["--cells", "absent.json"], ["absent.json"]),
        (["--nonsense", 1], ["--nonsense"]),
    ],
)
def test_misuse_is_named_exits_with_2_and_writes_nothing(
    more: list[object],
    words: list[str],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[[Sequence[str]], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Partition(ids=np.arange(1), centroids_deg=np.array([[50.0, 5.0]])).save("one.json")
    Partition(ids=np.array([0, 1, 7]), centroids_deg=np.full((3, 2), 50.0)).save("gap.json")
    for name, shape in (("other.pt", (5, DIM)), ("narrow.pt", (NUM_CELLS, 7))):
        sizes = (torch.ones(shape[1]), torch.ones(shape[1]), torch.ones(shape), torch.ones(shape[0]))
        save_head(name, dict(zip(TENSORS, sizes, strict=True)))
    arguments = flags_of(world, tmp_path / "out", *more)
    if "--cells" in more:
        arguments[arguments.index(str(world.cells))] = str(more[1])
        del arguments[-2:]
    said = refusal(arguments)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_split_or_have_no_position_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(metas: list[dict[str, object]]) -> str:
        write_photos(tmp_path / "emb", 0, metas, np.ones((len(metas), DIM), np.float32))
        out = tmp_path / "out"
        command = ["train", tmp_path / "emb", "--cells", world.cells, "--out", out]
        assert main([str(word) for word in command]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "has no column lat" in run([{"town": "a"}])
    assert "--truth" in run([{"lat": None, "lon": 1.0}, {"lat": "x", "lon": 2.0}])
    # Two places cannot make three splits.
    assert "val" in run([{"lat": 50.0, "lon": 5.0}, {"lat": 51.0, "lon": 5.0}])
    missing = ["train", str(tmp_path / "nowhere"), "--cells", str(world.cells), "--out", str(tmp_path / "out")]
    assert main(missing) == 2
    assert "holds no embeddings" in capsys.readouterr().err
    assert main(flags_of(world, world.emb)) == 2
    assert "was not made by this command" in capsys.readouterr().err


def test_one_folder_of_embeddings_counts_once_under_whatever_name(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(world.emb)
    arguments = flags_of(world, tmp_path / "out", "--group-by", "spot")
    assert main([*arguments[:2], str(tmp_path / "link"), *arguments[2:]]) == 2
    message = capsys.readouterr().err
    assert f"{world.emb} and {tmp_path / 'link'} are the same folder" in message
    assert not (tmp_path / "out").exists()


def test_a_photo_that_stands_in_two_pairs_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.emb, tmp_path / "emb")
    for folder, name, other in (
        ("img_emb", "img_emb_000000.npy", "img_emb_000009.npy"),
        ("metadata", "metadata_000000.parquet", "metadata_000009.parquet"),
    ):
        shutil.copy(tmp_path / "emb" / folder / name, tmp_path / "emb" / folder / other)
    arguments = flags_of(world, tmp_path / "out")
    assert main([arguments[0], str(tmp_path / "emb"), *arguments[2:]]) == 2
    assert "stand in more than one embedding pair" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
