"""The published heads by their short names, from a local server in the hub's layout, through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import locate_samples
import model_samples
import pytest
import torch
from hub_server import COMMIT, Hub, serving
from PIL import Image
from small_world import World, predictions
from torch import Tensor

import geoloc_batch
from geoloc_batch.cli import main
from geoloc_batch.geo.partition import Partition
from geoloc_batch.model.config import STREETCLIP
from geoloc_batch.model.heads import HEADS_REPO, PUBLISHED_HEADS
from geoloc_batch.model.hub import STREETCLIP_REVISION

DIM, SIDE = 8, 30
NAMES = [head.name for head in PUBLISHED_HEADS]


@dataclass(frozen=True)
class Published:
    """What the server has, and a photo with the features that transformers computes of it."""

    hub: Hub
    checkpoint: Path
    states: dict[str, dict[str, Tensor]]
    partitions: dict[str, Partition]
    photo: Path
    feature_1D: Tensor

    def asked(self) -> set[str]:
        """Files that were fetched, each as REPOSITORY/REVISION/PATH; each is fetched once."""
        # huggingface_hub has questions of its own, which are no files.
        paths = [line.removeprefix("GET /") for line in self.hub.requests if line.startswith("GET ")]
        files = [path.replace("/resolve/", "/") for path in paths if "/resolve/" in path]
        assert len(files) == len(set(files))
        return set(files)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    root = tmp_path_factory.mktemp("published")
    vision = {"hidden_size": DIM, "intermediate_size": 16, "num_attention_heads": 2}
    model = model_samples.make_model(vision=vision)
    checkpoint = model_samples.save(model, root / "streetclip")
    states, partitions = {}, {}
    for seed, head in enumerate(PUBLISHED_HEADS):
        # Steep, so that no rounding of the features could change the order.
        states[head.name] = locate_samples.make_state(head.num_cells, DIM, seed=seed, sharpness=3.0)
        path, cells = root / "heads" / head.path, root / "heads" / head.cells_path
        path.parent.mkdir(parents=True)
        torch.save({"model": states[head.name]}, path)
        if not cells.exists():
            cells.parent.mkdir(parents=True)
            partitions[head.cells_path] = locate_samples.make_partition(head.num_cells, seed=seed)
            partitions[head.cells_path].save(cells)
    pixels = model_samples.photos(1, SIDE)
    # As large as the encoder's photos, so that nothing is resized.
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(root / "holiday.png")
    pooled, _ = model_samples.reference(model, pixels)
    with serving() as hub:
        hub.repos = {HEADS_REPO: (root / "heads", COMMIT), STREETCLIP: (checkpoint, STREETCLIP_REVISION)}
        yield Published(hub, checkpoint, states, partitions, root / "holiday.png", pooled)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache, which the tests of this module share."""
    return tmp_path_factory.mktemp("hf")


@pytest.fixture
def online(published: Published, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """This process asks the local server, as one does that was started with HF_ENDPOINT and HF_HOME."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", published.hub.url)
    template = published.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    published.hub.requests.clear()
    return published


def quick_start(published: Published, name: str) -> tuple[list[int], list[float]]:
    prob, cell = locate_samples.quick_start(published.states[name], published.feature_1D, 5)
    return cell[0].tolist(), prob[0].tolist()


@pytest.mark.slow
def test_a_photo_alone_is_located_by_streetclip_and_the_default_head(published: Published, cache: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_ENDPOINT": published.hub.url, "HF_HOME": str(cache), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "geoloc_batch", "predict", str(published.photo)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    table, summary = done.stdout.splitlines()[-2:]
    assert json.loads(summary)["rows"] == 1
    head = PUBLISHED_HEADS[0]
    cells, _ = quick_start(published, head.name)
    lat, lon = published.partitions[head.cells_path].centroids_deg[cells[0]]
    assert table.split()[1:3] == [f"{lat:.4f}", f"{lon:.4f}"]
    assert table.split()[-1] == str(cells[0])
    for words in (f"{STREETCLIP}@{STREETCLIP_REVISION}", "licence CC-BY-NC 4.0"):
        assert words in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("head: "))
    assert line.startswith("head: eu-h3r4-v13 (8 pooled features, 1898 cells, position top1), ")
    assert f"{head.path}@{COMMIT[:12]}, " in line
    assert line.endswith("licence MIT")
    streetclip = {f"{STREETCLIP}/{STREETCLIP_REVISION}/{name}" for name in ("config.json", "model.safetensors")}
    assert published.asked() == streetclip | {f"{HEADS_REPO}/main/{path}" for path in (head.path, head.cells_path)}


def test_all_thirteen_are_fetched_once_and_answer_as_the_quick_start_does(
    online: Published, geoloc: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, heads = tmp_path / "out", [flag for name in NAMES for flag in ("--head", name)]
    flags = ["--out", out, "--encoder", online.checkpoint, "--precision", "fp32", "--batch-size", 1]
    code, summary = geoloc("predict", online.photo, *flags, *heads)
    assert (code, summary["rows"]) == (0, 1)
    for head in PUBLISHED_HEADS:
        (row,) = predictions(out, head.name)
        cell, prob = quick_start(online, head.name)
        assert row["topk_cell"] == cell
        assert row["topk_prob"] == pytest.approx(prob, abs=1e-5)
        assert (row["lat"], row["lon"]) == tuple(online.partitions[head.cells_path].centroids_deg[cell[0]])
    pinned = json.loads((out / "run.json").read_text())["config"]["heads"]
    assert [(head["name"], head["num_cells"]) for head in pinned] == [(h.name, h.num_cells) for h in PUBLISHED_HEADS]
    assert not [line for line in caplog.messages if "the published table says" in line]
    # Whatever the test before left in the cache is not fetched again.
    files = {path for head in PUBLISHED_HEADS for path in (head.path, head.cells_path)}
    assert {path.removeprefix(f"{HEADS_REPO}/main/") for path in online.asked()} <= files
    online.hub.requests.clear()
    code, listing = geoloc("heads")
    assert (code, [head["name"] for head in listing["heads"] if head["cached"]]) == (0, NAMES)
    assert online.hub.requests == []


def test_python_takes_short_names_too_and_needs_no_network_for_what_is_cached(
    online: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = geoloc_batch.load_head("eu-kmeans500", top_k=2).locate(online.feature_1D)
    assert first.topk_cell[0].tolist() == quick_start(online, "eu-kmeans500")[0][:2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    online.hub.requests.clear()
    again = geoloc_batch.load_head("eu-kmeans500", top_k=2).locate(online.feature_1D)
    assert (again.position_deg == first.position_deg).all()
    assert online.hub.requests == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--head", "eu-nutz3"], "no such head: eu-nutz3; did you mean eu-nuts3?"),
        (["--head", "eu-nuts3", "--head", "x=kmeans500"], "no such head: kmeans500; did you mean eu-kmeans500?"),
        (["--head", "eu-atlantis"], "`geoloc heads` lists the published ones"),
        (["--head", "eu-nuts3", "--cells", "absent.json"], "no such file of cells: absent.json"),
        (["--head", "a=eu-nuts3", "--head", "a=eu-h3r4"], "two heads are named a"),
    ],
)
def test_a_refusal_downloads_nothing_and_writes_nothing(
    online: Published,
    flags: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    # Not even the encoder, unless it is the head's files that are wrong.
    encoder = ["--encoder", str(online.checkpoint)] if "absent.json" in flags else []
    assert main(["predict", str(online.photo), "--out", str(tmp_path / "out"), *encoder, *flags]) == 2
    assert words in capsys.readouterr().err
    assert online.hub.requests == []
    assert not (tmp_path / "out" / "run.json").exists()
    assert "no such file of cells" in words or not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "fidelity"])
def test_a_misspelt_head_is_told_before_an_encoder_is_downloaded_for_shards_too(
    command: str,
    online: Published,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    out = ["--out", str(tmp_path / "out")] if command == "predict" else []
    assert main([command, str(world.shards), *out, "--head", "eu-nutz3"]) == 2
    assert "did you mean eu-nuts3?" in capsys.readouterr().err
    assert online.hub.requests == []
    assert not (tmp_path / "out").exists()


def test_cells_of_another_partition_are_refused(
    online: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "cells.json"
    locate_samples.make_partition(1193).save(other)
    flags = ["--encoder", str(online.checkpoint), "--head", "eu-nuts3", "--cells", str(other)]
    assert main(["predict", str(online.photo), *flags]) == 2
    message = capsys.readouterr().err
    assert "chooses among 1194 cells" in message
    assert f"{other} has 1193" in message


def test_offline_the_missing_file_is_named_with_the_remedy(
    online: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["predict", str(online.photo), "--encoder", str(online.checkpoint), "--head", "eu-kdtree78"]) == 1
    message = capsys.readouterr().err
    path = "sweep_v5/streetclip/kdtree78_eu/best.pt"
    assert f"{path} of {HEADS_REPO}@main" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert f"`hf download {HEADS_REPO} {path} --revision main --local-dir FOLDER`" in message
    assert f"give FOLDER/{path} in place of the name (--head, --cells)" in message
    assert online.hub.requests == []


def test_cells_that_are_elsewhere_in_the_repository_are_asked_of_the_user(
    online: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = PUBLISHED_HEADS[NAMES.index("eu-kmeans1000")]
    cells = online.hub.repos[HEADS_REPO][0] / head.cells_path
    own = tmp_path / "own.json"
    cells.rename(own)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    flags = ["predict", str(online.photo), "--encoder", str(online.checkpoint), "--head", head.name]
    try:
        assert main(flags) == 1
        message = capsys.readouterr().err
        assert f"looked for at hf:{HEADS_REPO}/{head.cells_path}" in message
        assert "give that with --cells" in message
        assert main([*flags, "--cells", str(own)]) == 0
    finally:
        own.rename(cells)


def test_a_run_with_published_heads_is_retried_by_their_names_whatever_lies_beside(
    online: Published, geoloc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eu-kmeans500").mkdir()
    (tmp_path / "eu-nuts3").write_text("no head")
    flags = ["--encoder", online.checkpoint, "--head", "eu-kmeans500", "--head", "north=eu-nuts3"]
    assert geoloc("predict", online.photo, "--out", tmp_path / "out", *flags)[0] == 0
    before = predictions(tmp_path / "out", "north")
    assert geoloc("retry", tmp_path / "out", "--unit", 0)[0] == 0
    assert predictions(tmp_path / "out", "north") == before
