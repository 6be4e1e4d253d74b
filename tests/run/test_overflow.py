"""fp16 ends at 65,504: units whose features overflow are made again as a whole in bf16. And memory that ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_world import BATCH, COUNTS, World, make_head, tree_bytes

from geoloc_batch.model.encoder import Encoder
from geoloc_batch.run import encoders, engine
from geoloc_batch.run.encoders import wider_precision
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.marker import Marker, read_marker

Geoloc = Callable[..., tuple[int, dict[str, Any]]]
LAYER = "vision_model.encoder.layers.1.mlp."
FP16 = ["--precision", "fp16"]


@pytest.fixture(scope="module")
def hot(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, int]:
    """A checkpoint that overflows in fp16, and not in bf16, on photos of one unit alone; and that unit."""
    peaks = np.split(hidden_peaks(world), np.cumsum(COUNTS)[:-1])
    of_unit = np.stack([of_photos.max(axis=0) for of_photos in peaks])
    ordered = np.sort(of_unit, axis=0)
    hidden = int((ordered[-1] / ordered[-2]).argmax())
    # Between the peak of the hottest unit and that of the next; ours is fc1 times 1.702 inside.
    scale = 65504 / 1.702 / float(np.sqrt(ordered[-1, hidden] * ordered[-2, hidden]))
    folder = tmp_path_factory.mktemp("hot")
    checkpoint = scaled(world.checkpoint, folder / "clip", hidden, scale)
    return replace(world, checkpoint=checkpoint), int(of_unit[:, hidden].argmax())


def hidden_peaks(world: World) -> np.ndarray[Any, Any]:
    """[photos, hidden units] largest input of an activation over a photo's tokens, as transformers computes it."""
    from transformers import CLIPImageProcessor, CLIPModel

    clip = CLIPModel.from_pretrained(world.checkpoint).vision_model.eval()
    processor = CLIPImageProcessor.from_pretrained(world.checkpoint)
    peaks: list[np.ndarray[Any, Any]] = []
    clip.encoder.layers[1].mlp.fc1.register_forward_hook(
        lambda _module, _inputs, output: peaks.append(output.abs().amax(dim=1)[0].numpy())
    )
    for shard in sorted(world.shards.iterdir()):
        with tarfile.open(shard) as tar, torch.inference_mode():
            for member in tar:
                if member.name.endswith(".jpg"):
                    image = Image.open(tar.extractfile(member)).convert("RGB")  # type: ignore[arg-type]
                    clip(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"])
    return np.stack(peaks)


def scaled(checkpoint: Path, folder: Path, hidden: int | slice, scale: float) -> Path:
    """The checkpoint with one activation `scale` times as large, and as much smaller again behind it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    state[f"{LAYER}fc1.weight"][hidden] *= scale
    state[f"{LAYER}fc1.bias"][hidden] *= scale
    state[f"{LAYER}fc2.weight"][:, hidden] /= scale
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def marker_of(out: Path, unit: int) -> Marker:
    marker = read_marker(out, Goal(unit))
    assert marker is not None
    return marker


def files_of(out: Path, unit: int) -> dict[str, bytes]:
    return {path: data for path, data in tree_bytes(out).items() if f"_{unit:06d}." in path}


def test_a_unit_that_overflows_is_made_again_in_bf16_as_a_whole_and_its_marker_says_so(
    hot: tuple[World, int],
    geoloc: Geoloc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hot_world, hot_unit = hot
    other, other_cells = make_head(tmp_path / "other", num_cells=11, seed=5)
    heads = [
        "--head",
        f"a={hot_world.head}",
        "--head",
        f"b={other}",
        "--cells",
        hot_world.cells,
        "--cells",
        other_cells,
    ]
    command = ["predict", hot_world.shards, "--save-embeddings", *hot_world.encoder_flags, *heads]
    code, summary = geoloc(*command, *FP16, "--out", tmp_path / "fp16")
    assert (code, summary["rows"], summary["errors"]) == (0, sum(COUNTS), 0)
    assert "made in bf16: fp16 gave" in caplog.text
    assert geoloc("verify", tmp_path / "fp16")[0] == 0
    geoloc(*command, "--precision", "bf16", "--out", tmp_path / "bf16")
    # What fp16 alone gives: an error row for each photo that overflows.
    monkeypatch.setattr("geoloc_batch.run.jobs.wider_precision", lambda *_: None)
    code, alone = geoloc(*command, *FP16, "--out", tmp_path / "alone")
    assert (code, alone["errors"] > 0) == (3, True)
    photos = "1 photo" if alone["errors"] == 1 else f"{alone['errors']} photos"
    for unit in range(len(COUNTS)):
        ours = files_of(tmp_path / "fp16", unit)
        assert len(ours) == 4
        in_bf16, in_fp16 = files_of(tmp_path / "bf16", unit), files_of(tmp_path / "alone", unit)
        assert (ours == in_bf16, ours == in_fp16) == (unit == hot_unit, unit != hot_unit)
        remark = f"made in bf16: fp16 gave {photos} with features that are not finite"
        assert marker_of(tmp_path / "fp16", unit).counts.warnings == ((remark,) if unit == hot_unit else ())


@pytest.mark.slow
def test_a_run_killed_before_its_units_were_made_again_resumes_to_the_same_bytes(
    hot: tuple[World, int], geoloc: Geoloc, tmp_path: Path
) -> None:
    hot_world, hot_unit = hot
    arguments = ["embed", str(hot_world.shards), *hot_world.encoder_flags, *FP16, "--out"]
    script = (
        "import os, signal, sys\n"
        "from geoloc_batch.model.encoder import Encoder\n"
        "Encoder.at_precision = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from geoloc_batch.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, str(tmp_path / "cut")], capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_marker(tmp_path / "cut", Goal(hot_unit)) is None
    assert files_of(tmp_path / "cut", hot_unit) == {}
    assert geoloc(*arguments, tmp_path / "cut")[0] == 0
    assert geoloc(*arguments, tmp_path / "whole")[0] == 0
    assert tree_bytes(tmp_path / "cut") == tree_bytes(tmp_path / "whole")
    assert marker_of(tmp_path / "cut", hot_unit).counts == marker_of(tmp_path / "whole", hot_unit).counts
    assert geoloc("verify", tmp_path / "cut")[0] == 0


def test_a_stop_before_units_are_made_again_gives_them_back(
    hot: tuple[World, int], geoloc: Geoloc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot_world, hot_unit = hot

    at_precision = Encoder.at_precision

    def stopped(self: Encoder, precision: str) -> Encoder:
        os.kill(os.getpid(), signal.SIGTERM)
        return at_precision(self, precision)

    command = ["embed", hot_world.shards, *hot_world.encoder_flags, *FP16, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "at_precision", stopped)
        code, summary = geoloc(*command)
    assert (code, summary["rows"]) == (75, sum(COUNTS) - COUNTS[hot_unit])
    assert list((tmp_path / "out" / "_leases").glob("0*")) == []
    assert geoloc(*command)[0] == 0


@pytest.mark.parametrize("max_aside", [1, 8])
def test_a_checkpoint_that_always_overflows_gives_what_bf16_gives(
    world: World, geoloc: Geoloc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_aside: int
) -> None:
    checkpoint = scaled(world.checkpoint, tmp_path / "clip", slice(None), 1e6)
    made: list[str] = []
    at_precision = Encoder.at_precision

    def counted(self: Encoder, precision: str) -> Encoder:
        made.append(precision)
        return at_precision(self, precision)

    monkeypatch.setattr(Encoder, "at_precision", counted)
    monkeypatch.setattr(engine, "MAX_ASIDE", max_aside)
    command = ["embed", world.shards, "--encoder", checkpoint, "--batch-size", BATCH]
    code, summary = geoloc(*command, *FP16, "--out", tmp_path / "fp16")
    assert (code, summary["rows"]) == (0, sum(COUNTS))
    assert made == ["bf16"]
    geoloc(*command, "--precision", "bf16", "--out", tmp_path / "bf16")
    assert tree_bytes(tmp_path / "fp16") == tree_bytes(tmp_path / "bf16")
    assert geoloc("verify", tmp_path / "fp16")[0] == 0
    (log,) = (tmp_path / "fp16" / "_logs").glob("*.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["rows"], last["errors"], last["units"]) == (sum(COUNTS), 0, len(COUNTS))
    # Every shard was read twice.
    assert last["bytes_read"] == 2 * sum(shard.stat().st_size for shard in world.shards.iterdir())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_photo_without_finite_features_in_any_precision_is_an_error_row(
    world: World, geoloc: Geoloc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    encode, precisions = Encoder.encode, []

    def broken(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        precisions.append(self.precision)
        features = encode(self, pixels).clone()
        # The brightest of all photos, wherever it stands.
        features[pixels.float().mean(dim=(1, 2, 3)) > threshold] = torch.nan
        return features

    threshold = brightest(world)
    monkeypatch.setattr(Encoder, "encode", broken)
    flags = [*world.encoder_flags, "--precision", precision, "--out", tmp_path / "out"]
    code, summary = geoloc("embed", world.shards, *flags)
    assert (code, summary["rows"], summary["errors"]) == (3, sum(COUNTS) - 1, 1)
    (path,) = (tmp_path / "out" / "errors").iterdir()
    (error,) = pq.read_table(path).to_pylist()
    assert (error["stage"], error["retryable"]) == ("encode", True)
    assert set(precisions) == ({"fp16", "bf16"} if precision == "fp16" else {precision})
    assert geoloc("verify", tmp_path / "out")[0] == 0


def brightest(world: World) -> float:
    """Between the brightest photo and the next, in the pixels that the stream gives."""
    from geoloc_batch.records import UnitEnd
    from geoloc_batch.stream.batches import BatchStream
    from geoloc_batch.stream.config import StreamConfig
    from geoloc_batch.stream.shards import expand_shards, plan_units

    levels: list[float] = []
    with BatchStream(
        plan_units(expand_shards([str(world.shards)])), side=56, batch_size=BATCH, config=StreamConfig()
    ) as stream:
        for item in stream:
            if not isinstance(item, UnitEnd):
                levels += item.pixels[: len(item.samples)].float().mean(dim=(1, 2, 3)).tolist()
                item.release()
    second, first = sorted(levels)[-2:]
    return (first + second) / 2


def test_memory_that_ends_is_told_with_the_batch_size_and_nothing_is_half_published(
    world: World, geoloc: Geoloc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from geoloc_batch.cli import main

    encode, calls = Encoder.encode, []

    def full(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return encode(self, pixels)

    command = ["embed", str(world.shards), *world.encoder_flags, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", full)
        assert main(command) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"out of memory at --batch-size {BATCH} (CUDA out of memory. Tried to allocate 2.00 GiB.)" in told
    assert "another --out" in told
    assert list((tmp_path / "out" / "_leases").glob("0*")) == []
    assert list((tmp_path / "out" / "_staging").iterdir()) == []
    for unit in range(len(COUNTS)):
        is_done = read_marker(tmp_path / "out", Goal(unit)) is not None
        assert len(files_of(tmp_path / "out", unit)) == (2 if is_done else 0)
    assert geoloc(*command)[0] == 0
    assert geoloc("verify", tmp_path / "out")[0] == 0


def test_weights_that_do_not_fit_are_told_without_a_traceback(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from geoloc_batch.cli import main

    def full(*_: Any, **__: Any) -> Encoder:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoders, "load_encoder", full)
    assert main(["embed", str(world.shards), *world.encoder_flags, "--out", str(tmp_path / "out")]) == 1
    assert "do not fit beside what it holds already" in capsys.readouterr().err


def test_what_follows_fp16_is_bf16_or_fp32_where_that_is_only_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert wider_precision("fp16", cpu) == "bf16"
    for precision in ("bf16", "fp32"):
        assert wider_precision(precision, cpu) is None
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16, **_: has_bf16)
        assert wider_precision("fp16", cuda) == expected
