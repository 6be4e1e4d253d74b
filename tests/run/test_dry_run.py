"""`geoloc embed --dry-run`: the stream alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from small_world import COUNTS, IMAGE_SIZE, World, draw_jpeg, write_tar

import geoloc_batch
from geoloc_batch.cli import main
from geoloc_batch.errors import CheckpointError, ConfigError
from geoloc_batch.run.dry_run import DEFAULT_IMAGE_SIZE, image_size_of

KEYS = ["units", "samples", "errors", "seconds", "images_per_second", "limiting_stage", "unit_errors"]


def test_it_reads_everything_and_writes_nothing(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = geoloc("embed", world.shards, "--dry-run", "--out", "never", *world.encoder_flags)
    assert code == 0
    assert list(told) == KEYS
    assert {"units": 4, "samples": sum(COUNTS), "errors": 0, "unit_errors": 0}.items() <= told.items()
    # Both are rounded to a thousandth.
    assert told["images_per_second"] == pytest.approx(sum(COUNTS) / told["seconds"], rel=0.2)
    assert told["limiting_stage"] in ("read", "decode")
    assert not list(tmp_path.iterdir())


def test_the_table_tells_stages_queues_and_what_an_encoder_needs(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*world.encoder_flags, "--target-images-per-second", "500", "--decode-threads", "3"]
    assert main(["embed", str(world.shards), "--dry-run", *flags]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    text = "\n".join(lines)
    assert lines[0].startswith("27 photos in 4 units, 0 errors, ")
    assert f"{told['images_per_second']:.1f} images/s at {IMAGE_SIZE} px" in text
    assert f"limited by {told['limiting_stage']}" in text
    assert [line.split()[:2] for line in lines if line.startswith(("read", "decode"))] == [
        ["read", "1"],
        ["decode", "3"],
    ]
    assert "photos waited to be decoded" in text
    assert "an encoder of 500 images/s needs " in text


def test_no_weights_are_needed(world: World, geoloc: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(world.checkpoint / "config.json", tmp_path / "checkpoint")
    code, told = geoloc("embed", world.shards, "--dry-run", "--encoder", tmp_path / "checkpoint")
    assert (code, told["samples"]) == (0, sum(COUNTS))


def test_the_image_size_is_the_encoders(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert image_size_of(str(world.checkpoint)) == IMAGE_SIZE
    assert image_size_of("demo") == 56
    assert image_size_of("open_clip:ViT-B-32") == 224
    assert image_size_of("open_clip:ViT-L/14-336:openai") == 336
    assert image_size_of("nobody/has-this") == DEFAULT_IMAGE_SIZE == 336
    for wrong in ("./absent", "absent", "open_clip:absent"):
        with pytest.raises(CheckpointError, match="absent"):
            image_size_of(wrong)


def test_damage_is_told_and_ends_as_a_run_would(
    geoloc: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = [(f"{row}.jpg", draw_jpeg(row)) for row in range(6)]
    write_tar(tmp_path / "a.tar", [*photos[:3], ("bad.jpg", b"no photo at all"), *photos[3:]])
    whole = write_tar(tmp_path / "b.tar", photos)
    whole.write_bytes(whole.read_bytes()[:9000])
    code, told = geoloc("embed", tmp_path, "--dry-run", "--encoder", "demo")
    assert (code, told["unit_errors"], told["errors"]) == (3, 1, 1)
    assert told["samples"] > 7
    assert "bad: decode: not an image" in caplog.text
    assert f"{whole}: " in caplog.text
    code, told = geoloc("embed", tmp_path / "a.tar", "--dry-run", "--encoder", "demo", "--max-error-rate", 0.5)
    assert (code, told["samples"], told["errors"]) == (0, 7, 1)


def test_limit_takes_the_first_photos(world: World, geoloc: Callable[..., Any]) -> None:
    code, told = geoloc("embed", world.shards, "--dry-run", "--limit", 7, *world.encoder_flags)
    assert (code, told["units"], told["samples"]) == (0, 2, 7)


def test_a_slow_pipe_limits_by_reading_and_large_photos_by_decoding(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    shard = next(iter(sorted(world.shards.iterdir())))
    _, told = geoloc("embed", f"pipe:sleep 0.5; cat {shard}", "--dry-run", "--encoder", "demo")
    assert (told["samples"], told["limiting_stage"]) == (COUNTS[0], "read")
    large = draw_jpeg(0, width=3000, height=2200)
    shard = write_tar(tmp_path / "large.tar", [(f"{number}.jpg", large) for number in range(12)])
    _, told = geoloc("embed", shard, "--dry-run", "--encoder", "demo")
    assert told["limiting_stage"] == "decode"


def test_a_python_caller_gets_the_figures(world: World) -> None:
    report = geoloc_batch.measure_stream(
        world.shards, encoder=world.checkpoint, batch_size=5, decode_threads=2, target_images_per_second=100
    )
    assert (report.samples, report.exit_code, report.image_size) == (27, 0, IMAGE_SIZE)
    assert report.stats.photos == 27
    assert report.stats.decode_threads == 2
    assert 0 < report.stats.decode_busy <= 1
    assert report.images_per_second_per_core == pytest.approx(27 / report.cpu_seconds)
    assert report.target_cores == pytest.approx(100 * report.cpu_seconds / 27)
    assert report.target_bytes_per_second == pytest.approx(100 * report.stats.bytes_read / 27)
    with pytest.raises(ConfigError, match="measure_stream"):
        geoloc_batch.embed(world.shards, out="never", dry_run=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--encoder", "demo"], "--out must be given"),
        (["--dry-run", "--encoder", "./absent"], "./absent"),
        (["--dry-run", "--target-images-per-second", "0"], "--target-images-per-second must be above 0, got 0"),
    ],
)
def test_misuse_is_named(flags: list[str], words: str, world: World, refusal: Callable[[Sequence[str]], str]) -> None:
    assert words in refusal(["embed", str(world.shards), *flags])


def test_an_interrupt_tells_what_was_measured_so_far(world: World, tmp_path: Path) -> None:
    shard = next(iter(sorted(world.shards.iterdir())))
    command = ["embed", str(shard), f"pipe:touch {tmp_path}/begun; sleep 60", "--dry-run", *world.encoder_flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "geoloc_batch", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    told = json.loads(out.splitlines()[-1])
    assert told["units"] == 2
    assert 0 <= told["samples"] <= COUNTS[0]


def test_cores_are_not_told_where_nothing_was_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [(f"{row}.jpg", b"no photo at all") for row in range(3)])
    assert main(["embed", str(tmp_path), "--dry-run", "--encoder", "demo"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("3 photos in 1 unit, 3 errors, ")
    assert "inf" not in out
    assert "cores that decode" not in out
