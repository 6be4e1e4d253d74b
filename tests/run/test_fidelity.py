"""A precision against fp32: by the command, and on the first batch of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import BATCH, COUNTS, World, draw_jpeg, make_head, tree_bytes, write_tar

from geoloc_batch import fidelity, load_head
from geoloc_batch.cli import main
from geoloc_batch.errors import ConfigError, InputError
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.model.encoder import load_encoder
from geoloc_batch.records import Sample, Unit
from geoloc_batch.run import first_batch
from geoloc_batch.run.fidelity import compare
from geoloc_batch.run.first_batch import FirstBatch
from geoloc_batch.run.transfer import HostTransfer
from geoloc_batch.store.features import read_features
from geoloc_batch.stream.batch import Batch

Geoloc = Callable[..., tuple[int, dict[str, Any]]]


def embedded(geoloc: Geoloc, world: World, out: Path, precision: str) -> np.ndarray[Any, Any]:
    """[27, D] features of the world's photos; stored in float16, of which the figures must allow for."""
    geoloc("embed", world.shards, "--out", out, *world.encoder_flags, "--precision", precision)
    return np.concatenate([read_features(npy).features_ND for npy in sorted((out / "img_emb").iterdir())])


def test_the_command_compares_features_and_the_places_of_every_head(
    world: World, geoloc: Geoloc, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, other_cells = make_head(tmp_path / "other", num_cells=11, seed=5)
    heads = ["--head", f"first={world.head}", "--head", other, "--cells", world.cells, "--cells", other_cells]
    flags = [*world.encoder_flags, *heads, "--precision", "bf16"]
    assert main([str(part) for part in ["fidelity", world.shards, *flags]]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert {"precision": "bf16", "photos": sum(COUNTS), "errors": 0, "not_finite": 0}.items() <= told.items()
    assert any(line.startswith("first ") for line in table)
    lower = embedded(geoloc, world, tmp_path / "bf16", "bf16")
    reference = embedded(geoloc, world, tmp_path / "fp32", "fp32")
    lengths = np.linalg.norm(lower, axis=1), np.linalg.norm(reference, axis=1)
    cosine = (lower * reference).sum(axis=1) / lengths[0] / lengths[1]
    error = np.linalg.norm(lower - reference, axis=1) / lengths[1]
    assert told["cosine_min"] == pytest.approx(cosine.min(), abs=1e-5)
    assert told["cosine_mean"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert told["max_relative_error"] == pytest.approx(error.max(), rel=0.1)
    assert 1e-3 < told["max_relative_error"] < 0.1
    files = {"first": (world.head, world.cells), "other": (other, other_cells)}
    assert [place["head"] for place in told["heads"]] == list(files)
    for place in told["heads"]:
        locator = load_head(*files[place["head"]], top_k=5)
        ours, theirs = (locator.locate(torch.from_numpy(features)) for features in (lower, reference))
        shift = haversine_km(ours.mean_deg, theirs.mean_deg)
        same_5 = [len(set(a) & set(b)) / 5 for a, b in zip(ours.topk_cell, theirs.topk_cell, strict=True)]
        same_1 = ours.topk_cell[:, 0] == theirs.topk_cell[:, 0]
        # One photo of 27 may fall to the other side by the rounding of what was stored.
        assert place["top_1_percent"] == pytest.approx(100 * same_1.mean(), abs=4)
        assert place["top_5_percent"] == pytest.approx(100 * np.mean(same_5), abs=2)
        assert place["median_shift_km"] == pytest.approx(np.median(shift), rel=0.25)
        assert place["p99_shift_km"] == pytest.approx(np.percentile(shift, 99), rel=0.25)


def test_figures_are_those_of_their_definition(world: World) -> None:
    head = load_head(world.head, world.cells)
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(5, head.dim)).astype(np.float32)
    lower = reference.copy()
    lower[1] *= 2
    lower[2, 0] = np.inf
    lower[3] = reference[4]
    found = compare("fp16", lower, reference, [head])
    assert found is not None
    assert (found.photos, found.not_finite) == (4, 1)
    of_3 = reference[3] @ reference[4] / np.linalg.norm(reference[3]) / np.linalg.norm(reference[4])
    assert found.cosine_min == pytest.approx(of_3, abs=1e-6)
    assert found.cosine_mean == pytest.approx((3 + of_3) / 4, abs=1e-6)
    distance = np.linalg.norm(reference[3] - reference[4]) / np.linalg.norm(reference[3])
    assert found.max_relative_error == pytest.approx(max(1.0, distance), rel=1e-6)
    third, fourth = head.locate(torch.from_numpy(reference[3:4])), head.locate(torch.from_numpy(reference[4:5]))
    (place,) = found.heads
    # The layer norm before the head takes the factor off again.
    assert place.top_1_percent == 75
    num_common = len(set(third.topk_cell[0]) & set(fourth.topk_cell[0]))
    assert place.top_5_percent == pytest.approx(100 * (3 + num_common / 5) / 4)
    shifts = [0, 0, 0, float(haversine_km(third.mean_deg, fourth.mean_deg)[0])]
    assert place.median_shift_km == pytest.approx(0, abs=0.01)
    assert place.p99_shift_km == pytest.approx(np.percentile(shifts, 99), rel=1e-4)


def test_a_precision_compared_with_itself_is_without_fault() -> None:
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    found = compare("fp32", features, features)
    assert found is not None
    assert (found.cosine_min, found.max_relative_error, found.heads) == (pytest.approx(1, abs=1e-12), 0, ())
    assert compare("fp16", np.full_like(features, np.nan), features) is None


def test_fp32_is_what_others_are_compared_with_and_auto_is_never_that(world: World) -> None:
    flags = {"encoder": world.checkpoint, "batch_size": 5}
    with pytest.raises(ConfigError, match="give bf16 or fp16"):
        fidelity(world.shards, precision="fp32", **flags)
    with pytest.raises(ConfigError, match="--cells was given without --head"):
        fidelity(world.shards, cells=[world.cells], **flags)
    report = fidelity(world.shards, limit=4, **flags)
    assert (report.found.precision, report.found.photos, report.found.heads) == ("bf16", 4, ())


def test_photos_that_cannot_be_read_are_counted_and_none_at_all_is_misuse(world: World, tmp_path: Path) -> None:
    members = [("a.jpg", draw_jpeg(1)), ("b.jpg", b"no photo"), ("c.jpg", draw_jpeg(2))]
    shard = write_tar(tmp_path / "a.tar", members)
    report = fidelity(shard, encoder=world.checkpoint, batch_size=2, precision="fp16")
    assert (report.errors, report.found.photos, report.found.precision) == (1, 2, "fp16")
    bad = write_tar(tmp_path / "b.tar", members[1:2])
    with pytest.raises(InputError, match="no photo to compare; 1 could not be read"):
        fidelity(bad, encoder=world.checkpoint, batch_size=2)


def first_figures(out: Path) -> dict[str, Any]:
    (path,) = (out / "_logs").glob("*.fidelity.json")
    return dict(json.loads(path.read_text()))


def embed_with(world: World, out: Path, precision: str, batch_size: int) -> int:
    flags = ["--encoder", world.checkpoint, "--batch-size", batch_size, "--precision", precision, "--out", out]
    return main([str(part) for part in ["predict", world.shards, "--save-embeddings", *world.head_flags, *flags]])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_notes_what_its_precision_costs_on_its_first_photos(world: World, tmp_path: Path, precision: str) -> None:
    assert embed_with(world, tmp_path / "out", precision, 24) == 0
    found = first_figures(tmp_path / "out")
    assert (found["precision"], found["photos"], found["not_finite"]) == (precision, first_batch.NUM_PHOTOS, 0)
    assert 0.99 < found["cosine_min"] < 1
    assert 0 < found["max_relative_error"] < 0.1
    assert found["heads"][0]["head"] == "head"
    assert found["heads"][0]["top_5_percent"] > 50


def test_a_run_in_fp32_has_nothing_to_note(world: World, tmp_path: Path) -> None:
    assert embed_with(world, tmp_path / "out", "fp32", 24) == 0
    assert list((tmp_path / "out" / "_logs").glob("*.fidelity.json")) == []


@pytest.mark.parametrize("what", ["few photos", "no memory", "a failure", "no time", "not finite"])
def test_whatever_prevents_the_note_is_written_down_and_the_rows_stand(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    batch_size = BATCH if what == "few photos" else 24
    assert embed_with(world, tmp_path / "whole", "bf16", batch_size) == 0
    caplog.set_level(logging.WARNING)
    caplog.clear()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if what == "no memory":
        monkeypatch.setattr(first_batch, "free_bytes", lambda _device: 1 << 20)
    if what == "a failure":
        monkeypatch.setattr(first_batch, "reference_of", full)
    if what == "no time":
        monkeypatch.setattr(first_batch, "MAX_SECONDS", -1.0)
    if what == "not finite":
        monkeypatch.setattr(first_batch, "compare", lambda *_: None)
    assert embed_with(world, tmp_path / "out", "bf16", batch_size) == 0
    found = first_figures(tmp_path / "out")
    if what == "no time":
        assert found["photos"] == 1
    else:
        reason = {
            "few photos": "the first batch holds 8 photos, fewer than 16",
            "no memory": "0.0 GB of memory are free, 1.1 GB may be needed",
            "a failure": "OutOfMemoryError: CUDA out of memory.",
            "not finite": "none of 16 photos has finite features",
        }[what]
        assert found["skipped"] == reason
    assert not caplog.records
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_the_photos_are_kept_though_the_decoders_write_over_their_buffer(world: World, tmp_path: Path) -> None:
    encoder = load_encoder(str(world.checkpoint), precision="bf16", batch_size=16, compile="off")
    pixels = torch.randint(0, 256, (16, 56, 56, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    unit = Unit(index=0, kind="shard", source="a.tar")
    samples = tuple(Sample(unit, "a.tar", row, str(row), b"") for row in range(16))
    batch = Batch(pixels, samples, lambda: pixels.zero_().sum())
    watched = FirstBatch(encoder, [], tmp_path / "found.json").watch(batch, HostTransfer(encoder))
    watched.wait()
    with watched.landed() as features:
        assert len(features.host_BD) == 16
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["photos"] == 16
    assert found["cosine_min"] > 0.99


def test_free_memory_is_what_could_be_had_now() -> None:
    free = first_batch.free_bytes(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 50
