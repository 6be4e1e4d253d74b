"""The main job through the command line: embed, predict, resume, errors, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_world import draw_jpeg, make_checkpoint, make_head, make_shards, tree_bytes, write_tar

from geoloc_batch.cli import main

COUNTS = [5, 9, 1, 12]
BATCH = 8


@dataclass(frozen=True)
class World:
    root: Path
    checkpoint: Path
    head: Path
    cells: Path
    shards: Path

    @property
    def encoder_flags(self) -> list[str]:
        return ["--encoder", str(self.checkpoint), "--batch-size", str(BATCH)]

    @property
    def head_flags(self) -> list[str]:
        return ["--head", str(self.head), "--cells", str(self.cells)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    make_shards(root / "shards", COUNTS)
    head, cells = make_head(root / "head")
    return World(root, make_checkpoint(root / "checkpoint"), head, cells, root / "shards")


@pytest.fixture
def geoloc(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command in this process; gives the exit code and the JSON of the last line on stdout."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        lines = capsys.readouterr().out.splitlines()
        return code, json.loads(lines[-1])

    return run


def predictions(out: Path, tree: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((out / tree / "predictions").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def quick_start(world: World, photos: list[Path], top_k: int = 5) -> list[tuple[list[int], list[float]]]:
    """What the published heads' quick start computes, with transformers, one photo at a time in fp32."""
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel

    clip = CLIPModel.from_pretrained(world.checkpoint).vision_model.eval()
    processor = CLIPImageProcessor.from_pretrained(world.checkpoint)
    state = torch.load(world.head, weights_only=True)["model"]
    answers = []
    with torch.inference_mode():
        for photo in photos:
            pixels = processor(images=Image.open(photo).convert("RGB"), return_tensors="pt")["pixel_values"]
            features = clip(pixel_values=pixels).pooler_output.float()
            normed = torch.nn.functional.layer_norm(
                features, features.shape[-1:], state["head.0.weight"], state["head.0.bias"]
            )
            probs = (normed @ state["head.2.weight"].T + state["head.2.bias"]).softmax(-1)[0]
            best = probs.topk(top_k)
            answers.append((best.indices.tolist(), best.values.tolist()))
    return answers


def test_predict_on_real_photos_equals_the_published_quick_start(
    world: World, real_photos: list[Path], geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    code, _ = geoloc("pack", real_photos[0].parent.parent, "--out", tmp_path / "shards")
    assert code == 0
    flags = [*world.encoder_flags, *world.head_flags, "--precision", "fp32", "--top-k", "5"]
    code, summary = geoloc("predict", tmp_path / "shards", "--out", tmp_path / "pred", *flags)
    assert code == 0
    assert summary["rows"] == summary["samples"] == len(real_photos)
    rows = {row["key"]: row for row in predictions(tmp_path / "pred")}
    for photo, (cells, probs) in zip(real_photos, quick_start(world, real_photos), strict=True):
        row = rows[f"{photo.parent.name}/{photo.stem}"]
        assert row["topk_cell"] == cells, photo
        np.testing.assert_allclose(row["topk_prob"], probs, atol=1e-4)
        assert row["cell"] == cells[0]


def test_embeddings_and_predictions_stand_row_by_row_beside_their_metadata(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["--save-embeddings", *world.encoder_flags, *world.head_flags]
    code, summary = geoloc("predict", world.shards, "--out", tmp_path / "p", *flags)
    assert code == 0
    assert {"units": 4, "samples": 27, "rows": 27, "errors": 0}.items() <= summary.items()
    assert summary["limiting_stage"] in {"read", "decode", "encode", "locate", "write", "commit", "ledger"}
    for unit, count in enumerate(COUNTS):
        features = np.load(tmp_path / "p" / "img_emb" / f"img_emb_{unit:06d}.npy")
        table = pq.read_table(tmp_path / "p" / "metadata" / f"metadata_{unit:06d}.parquet").to_pydict()
        assert features.dtype == np.dtype("<f2")
        assert features.shape[0] == count
        np.testing.assert_allclose(np.linalg.norm(features.astype(np.float32), axis=1), 1, atol=2e-3)
        assert table["key"] == [f"{unit:02d}/{row:04d}" for row in range(count)]
        assert table["row"] == list(range(count))
        assert table["place"] == [f"p{sum(COUNTS[:unit]) + row}" for row in range(count)]


def test_predicting_from_embeddings_agrees_with_predicting_from_shards(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["--save-embeddings", *world.encoder_flags, *world.head_flags]
    geoloc("predict", world.shards, "--out", tmp_path / "a", *flags)
    code, summary = geoloc("predict", "--from-embeddings", tmp_path / "a", "--out", tmp_path / "b", *world.head_flags)
    assert code == 0
    assert summary["rows"] == 27
    direct, stored = predictions(tmp_path / "a"), predictions(tmp_path / "b")
    assert [row["key"] for row in direct] == [row["key"] for row in stored]
    assert [row["shard"] for row in direct] == [row["shard"] for row in stored]
    assert [row["meta_place"] for row in direct] == [row["meta_place"] for row in stored]
    for ours, theirs in zip(direct, stored, strict=True):
        probs = dict(zip(theirs["topk_cell"], theirs["topk_prob"], strict=True))
        for cell, prob in zip(ours["topk_cell"], ours["topk_prob"], strict=True):
            assert abs(probs.get(cell, prob) - prob) < 1e-3


def test_a_row_says_its_cells_centroid_or_the_posterior_mean(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    cells = json.loads(world.cells.read_text())
    for position in ("top1", "mean"):
        out = tmp_path / position
        geoloc("predict", world.shards, "--out", out, "--position", position, *world.encoder_flags, *world.head_flags)
        for row in predictions(out):
            centroid = cells[str(row["cell"])]
            expected = (centroid["centroid_lat"], centroid["centroid_lon"])
            if position == "mean":
                expected = (row["mean_lat"], row["mean_lon"])
            assert (row["lat"], row["lon"]) == pytest.approx(expected, abs=1e-9)
            assert row["prob"] == row["topk_prob"][0] == max(row["topk_prob"])
            assert row["spread_km"] > 0
            assert 0 <= row["entropy"] <= np.log(len(cells)) + 1e-6


def test_several_heads_share_one_pass_and_write_a_tree_each(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    other, other_cells = make_head(tmp_path / "other", num_cells=11, seed=5)
    flags = ["--head", f"first={world.head}", "--head", other, "--cells", world.cells, "--cells", other_cells]
    code, _ = geoloc("predict", world.shards, "--out", tmp_path / "two", *world.encoder_flags, *flags)
    assert code == 0
    geoloc("predict", world.shards, "--out", tmp_path / "one", *world.encoder_flags, *world.head_flags)
    assert predictions(tmp_path / "two", "first") == predictions(tmp_path / "one")
    assert {cell for row in predictions(tmp_path / "two", "other") for cell in row["topk_cell"]} <= set(range(11))


def test_batches_run_across_shard_borders_and_only_the_last_is_padded(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoloc_batch.model.encoder import Encoder

    sizes: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", counted)
    geoloc("embed", world.shards, "--out", tmp_path / "emb", *world.encoder_flags)
    assert sizes == [BATCH] * -(-sum(COUNTS) // BATCH)


def test_a_damaged_photo_and_a_cut_shard_are_told_and_everything_else_is_kept(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    photos = [(f"{row}.jpg", draw_jpeg(row)) for row in range(6)]
    write_tar(shards / "a.tar", [*photos[:3], ("bad.jpg", b"no photo at all"), *photos[3:]])
    whole = write_tar(shards / "b.tar", photos)
    whole.write_bytes(whole.read_bytes()[:9000])
    out = tmp_path / "out"
    code, summary = geoloc("predict", shards, "--out", out, *world.encoder_flags, *world.head_flags)
    assert code == 3
    assert summary["unit_errors"] == 1
    assert summary["samples"] == summary["rows"] + summary["errors"]
    errors = pq.read_table(out / "errors" / "errors_000000.parquet").to_pylist()
    assert [(error["key"], error["row"], error["stage"]) for error in errors] == [("bad", 3, "decode")]
    assert [row["key"] for row in predictions(out)][:6] == ["0", "1", "2", "3", "4", "5"]
    code, proof = geoloc("verify", out)
    assert code == 0
    assert proof["samples"] == proof["rows"] + proof["errors"]


def test_a_second_run_on_a_complete_folder_does_nothing_and_says_the_same(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    command = ["embed", world.shards, "--out", tmp_path / "emb", *world.encoder_flags]
    geoloc(*command)
    before = tree_bytes(tmp_path / "emb")
    code, summary = geoloc(*command)
    assert code == 0
    assert summary["rows"] == 27
    assert summary["images_per_second"] == 0
    assert tree_bytes(tmp_path / "emb") == before


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


def test_limit_takes_the_first_photos_in_the_order_of_the_shards(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    code, summary = geoloc("embed", world.shards, "--out", tmp_path / "emb", "--limit", 7, *world.encoder_flags)
    assert code == 0
    assert summary["rows"] == 7
    tables = [pq.read_table(path) for path in sorted((tmp_path / "emb" / "metadata").iterdir())]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert keys == ["00/0000", "00/0001", "00/0002", "00/0003", "00/0004", "01/0000", "01/0001"]


def test_a_killed_run_resumes_and_equals_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, [6] * 12)
    arguments = ["embed", str(shards), *world.encoder_flags]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "geoloc_batch", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list((out / "_done").rglob("*.json"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list((out / "_done").rglob("*.json")))
    assert main([*arguments, "--out", str(out)]) == 0
    assert done >= 2
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_sigterm_ends_with_75_and_the_next_run_completes(world: World, tmp_path: Path) -> None:
    # A pipe that never ends after its first photos keeps the run busy until the signal comes.
    shard = make_shards(tmp_path / "shards", [3])[0]
    out = tmp_path / "out"
    arguments = ["embed", str(shard), f"pipe:cat {shard}; sleep 60", "--out", str(out), *world.encoder_flags]
    process = subprocess.Popen([sys.executable, "-m", "geoloc_batch", *arguments], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(list((out / "_leases").glob("*"))) >= 2, process)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert json.loads(stdout.splitlines()[-1])["units"] == 2
    assert main(["verify", str(out)]) == 1


def test_sigterm_ends_a_run_that_waits_for_a_stalled_pipe_and_the_pipe_with_it(world: World, tmp_path: Path) -> None:
    shard = make_shards(tmp_path / "shards", [3])[0]
    out, mark = tmp_path / "out", f"61.{os.getpid()}"
    arguments = ["embed", f"pipe:cat {shard}; sleep {mark}", "--out", str(out), *world.encoder_flags]
    process = subprocess.Popen([sys.executable, "-m", "geoloc_batch", *arguments], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list((out / "_leases").glob("000000.*"))) >= 1, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 75
    assert list((out / "_leases").glob("000000.*")) == []
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if mark.encode() in line and b"sleep" in line]


def test_a_signal_while_the_parts_are_loaded_ends_with_75_too(world: World, tmp_path: Path) -> None:
    arguments = ["embed", str(world.shards), "--out", str(tmp_path / "out"), *world.encoder_flags]
    script = (
        "import os, signal, sys\n"
        "from geoloc_batch.run import jobs\n"
        "jobs.load_encoder = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from geoloc_batch.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended early with {process.returncode}"
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.005)


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


def test_two_processes_on_one_folder_write_each_key_once(world: World, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, [6] * 10)
    arguments = ["embed", str(shards), *world.encoder_flags]
    command = [sys.executable, "-m", "geoloc_batch", *arguments, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert main(["verify", str(tmp_path / "two")]) == 0
    assert set(tree_bytes(tmp_path / "two")) == set(tree_bytes(tmp_path / "one"))


def test_a_photo_is_located_without_an_output_folder(
    world: World, real_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = real_photos[-1]
    assert main(["predict", str(photo), *world.encoder_flags, *world.head_flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(photo.name in line for line in lines[:-1])
    assert json.loads(lines[-1])["rows"] == 1


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
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.jpg", draw_jpeg(0))])
    try:
        code = main(arguments)
    except SystemExit as stop:  # tyro's own way out
        code = int(str(stop.code))
    message = capsys.readouterr().err
    assert code == 2, message
    assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "x").exists()


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
    with pytest.raises(geoloc_batch.errors.ConfigError, match="did you mean top_k"):
        geoloc_batch.predict(world.shards, out=tmp_path / "x", topk=3)


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


def test_predicting_from_an_incomplete_run_says_so_and_is_completed_later(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    emb, pred = tmp_path / "emb", tmp_path / "pred"
    geoloc("embed", world.shards, "--out", emb, *world.encoder_flags)
    aside = tmp_path / "aside"
    moved = ["img_emb/img_emb_000001.npy", "metadata/metadata_000001.parquet", "_done/000/000001.json"]
    for name in moved:
        (aside / name).parent.mkdir(parents=True)
        (emb / name).rename(aside / name)
    code, summary = geoloc("predict", "--from-embeddings", emb, "--out", pred, *world.head_flags)
    assert (code, summary["rows"]) == (75, sum(COUNTS) - COUNTS[1])
    assert "1 of its units are missing" in caplog.text
    for name in moved:
        (aside / name).rename(emb / name)
    code, summary = geoloc("predict", "--from-embeddings", emb, "--out", pred, *world.head_flags)
    assert (code, summary["rows"]) == (0, sum(COUNTS))


def test_a_head_may_move_between_two_runs(world: World, geoloc: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--out", tmp_path / "out", *world.encoder_flags]
    assert geoloc("predict", world.shards, *flags, *world.head_flags)[0] == 0
    head, cells = make_head(tmp_path / "elsewhere")
    head.write_bytes(world.head.read_bytes())
    cells.write_bytes(world.cells.read_bytes())
    assert geoloc("predict", world.shards, *flags, "--head", head)[0] == 0


def test_rows_whose_probabilities_are_no_numbers_become_errors(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    state = torch.load(world.head, weights_only=True)
    state["model"]["head.2.weight"] = torch.where(state["model"]["head.2.weight"] > 0, 3e38, -3e38)
    (tmp_path / "head").mkdir()
    torch.save(state, tmp_path / "head" / "best.pt")
    flags = ["--head", tmp_path / "head" / "best.pt", "--cells", world.cells, *world.encoder_flags]
    code, summary = geoloc("predict", world.shards, "--out", tmp_path / "out", *flags)
    assert code == 3
    assert summary["rows"] + summary["errors"] == summary["samples"] == 27
    assert summary["errors"] > 0
    assert all(np.isfinite(row["prob"]) for row in predictions(tmp_path / "out"))
    errors = pq.read_table(tmp_path / "out" / "errors" / "errors_000001.parquet").to_pylist()
    assert {error["stage"] for error in errors} == {"locate"}
