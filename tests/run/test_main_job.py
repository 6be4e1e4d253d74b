"""The main job through the command line: embed, predict, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_world import (
    BATCH,
    COUNTS,
    World,
    draw_jpeg,
    make_head,
    predictions,
    tree_bytes,
    write_tar,
)


def quick_start(world: World, photos: list[Path]) -> list[np.ndarray]:
    """The probabilities [C] of the published heads' quick start, with transformers, photo by photo in fp32."""
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
            answers.append((normed @ state["head.2.weight"].T + state["head.2.bias"]).softmax(-1)[0].numpy())
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
    for photo, probs_C in zip(real_photos, quick_start(world, real_photos), strict=True):
        row = rows[f"{photo.parent.name}/{photo.stem}"]
        np.testing.assert_allclose(row["topk_prob"], probs_C[row["topk_cell"]], atol=1e-5)
        # The same cells in the same order, but for cells that are equal up to rounding.
        np.testing.assert_allclose(probs_C[row["topk_cell"]], np.sort(probs_C)[::-1][:5], atol=2e-6)
        assert row["cell"] == row["topk_cell"][0]


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
