from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of scripts/."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_pixels_that_are_not_those_of_transformers_end_the_benchmark_without_a_ratio(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, parity = script("bench_stream"), script("stream_parity")
    monkeypatch.setattr(bench, "photo_sets", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["bench_stream.py", "--photos", "/absent"])
    # What the script sets for its whole process must not outlast this test.
    monkeypatch.setattr(bench, "usable_cpus", lambda: 1)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda _: None)
    real = parity.streamed_pixels

    def one_off(shard: str) -> dict[int, Any]:
        pixels = real(shard)
        pixels[3][0, 0, 0] ^= 1
        return dict(pixels)

    monkeypatch.setattr(parity, "streamed_pixels", one_off)
    assert bench.main() == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert next((bar["value"], bar["met"]) for bar in told["bars"]) == (1, False)
    assert not [bar for bar in told["bars"] if bar["unit"] in ("ratio", "photos/s", "samples per CPU second")]


def test_parity_counts_photos_that_differ_and_measures_pil(script: Any, tmp_path: Path) -> None:
    photos, parity = script("stream_photos"), script("stream_parity")
    drift = parity.drift_of(tmp_path, photos.odd_photos())
    assert drift.num_unlike == 0
    assert 1 <= drift.max_levels <= 2
    assert 0.98 <= drift.min_identical < 1
    assert drift.is_within(2, 0.98)
    assert not drift.is_within(2, 1.0)


def test_the_photos_are_the_same_in_every_run_and_as_large_as_street_photos(script: Any) -> None:
    photos = script("stream_photos")
    drawn = photos.street_photos(3)
    assert drawn == photos.street_photos(3)
    assert len({len(photo) for photo in drawn}) == 3
    assert all(60_000 <= len(photo) <= 130_000 for photo in drawn)


# webdataset leaves its shards to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_both_clocks_count_photos_and_the_reader_finds_what_webdataset_finds(script: Any, tmp_path: Path) -> None:
    photos, contenders = script("stream_photos"), script("stream_contenders")
    small = [photos.jpeg(np.full((40, 60, 3), level, np.uint8), 90) for level in (0, 99, 200)]
    packed = photos.packed(tmp_path, "a few", small, 4, 2)
    assert (packed.num_photos, packed.half().num_photos, len(packed.half().shards)) == (48, 24, 6)
    pace, stats = contenders.stream(packed, 2)
    assert stats.photos == 48
    assert pace.photos_per_s > 0
    assert contenders.pool(packed, 2).photos_per_s > 0
    assert {name: walk(packed.shards[0]) for name, walk in contenders.WALKS.items()} == dict.fromkeys(
        ("ours", "webdataset", "tarfile"), 4
    )


@pytest.mark.slow
def test_a_quick_run_measures_every_bar(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_stream.py"), "--quick", "--scratch", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    # A short run on a machine that does other things may miss a floor, but it says so in the one form.
    assert ran.returncode in (0, 1), ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["bench"] == "stream"
    bars = {bar["name"]: bar for bar in told["bars"]}
    assert all(set(bar) == {"name", "value", "floor", "goal", "unit", "met"} for bar in bars.values())
    for name, floor in (
        ("stream / bare decode + resize pool, street 640", 0.92),
        ("stream / quick start's loop, street 640", 3.5),
        ("tar walk / webdataset's iterator", 3.0),
    ):
        assert bars[name]["floor"] == floor
        assert bars[name]["value"] > 0
    assert ran.returncode == any(bar["met"] is False for bar in bars.values())
    assert list(tmp_path.iterdir()) == []
