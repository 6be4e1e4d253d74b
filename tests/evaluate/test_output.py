"""The folder of an evaluation: what is replaced, what is refused, and what a crash leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_samples import compare, written_metrics, written_rows

from geoloc_batch.errors import ConfigError, OutputError
from geoloc_batch.evaluate.config import EvaluateConfig

ONE = {"key": ["a"], "lat": [48.0], "lon": [2.0]}
TWO = {"key": ["a", "b"], "lat": [48.0, 50.0], "lon": [2.0, 3.0]}


def test_an_earlier_evaluation_is_replaced(tmp_path: Path) -> None:
    compare(tmp_path, ONE, ONE)
    # What an evaluation left that was killed in the middle of a file.
    (tmp_path / "scores" / ".rows.parquet.1.part").write_text("half", encoding="utf-8")
    compare(tmp_path, TWO, TWO)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "metrics.json",
        "metrics.md",
        "rows.parquet",
    ]
    assert written_metrics(tmp_path)["rows"] == len(written_rows(tmp_path)) == 2


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "predictions", ".other.json.1.part"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    compare(tmp_path, ONE, ONE)
    (tmp_path / "scores" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=rf"holds other files \({name}\); name a new folder"):
        compare(tmp_path, TWO, TWO)
    assert written_metrics(tmp_path)["rows"] == 1
    assert (tmp_path / "scores" / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("text", ["{}", "[]", '{"kind": "training"}', "no json", "\xff"])
def test_a_metrics_json_of_another_tool_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores" / "metrics.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(OutputError, match=r"holds a metrics.json that `geoloc evaluate` did not write"):
        compare(tmp_path, ONE, ONE)
    assert path.read_bytes() == text.encode("latin-1")


def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="scores is a file; name a folder"):
        compare(tmp_path, ONE, ONE)
    with pytest.raises(OutputError, match="s3://bucket/scores is a URL"):
        compare(tmp_path, ONE, ONE, out="s3://bucket/scores")


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_crash_at_any_move_leaves_no_metrics_of_another_evaluation_and_the_next_run_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    compare(tmp_path, ONE, ONE)
    real, moves = os.replace, []

    def dying(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == nth:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, TWO, TWO)
    monkeypatch.undo()
    assert not (tmp_path / "scores" / "metrics.json").exists()
    # What a process that is killed cannot take away.
    (tmp_path / "scores" / ".rows.parquet.1234567.part").write_bytes(b"half")
    compare(tmp_path, TWO, TWO)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "metrics.json",
        "metrics.md",
        "rows.parquet",
    ]
    assert written_metrics(tmp_path)["rows"] == len(written_rows(tmp_path)) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"predictions": ""}, "PREDICTIONS must not be empty"),
        ({"out": ""}, "--out must not be empty"),
        ({"thresholds": (5.0, 0.0)}, "--thresholds must be above 0 km, got 0"),
        ({"thresholds": (float("nan"),)}, "--thresholds must be above 0 km, got nan"),
        ({"thresholds": (float("inf"),)}, "--thresholds must be above 0 km, got inf"),
        ({"key_column": ""}, "--key-column must not be empty"),
        ({"lat_column": "x", "lon_column": "x"}, "--lat-column and --lon-column are both 'x'"),
        ({"key_column": "lat"}, "--key-column and --lat-column are both 'lat'"),
        ({"key_column": "x", "lon_column": "x"}, "--key-column and --lon-column are both 'x'"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EvaluateConfig(**{"predictions": "p", "out": "o", **flags})  # type: ignore[arg-type]


def test_settings_are_read_without_torch_and_without_pyarrow() -> None:
    code = "import geoloc_batch.evaluate.config, sys; print({'torch', 'pyarrow', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    code = "import geoloc_batch.evaluate.comparison, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_tilde_that_the_shell_left_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = EvaluateConfig(predictions="~/p.csv", out="~/scores", truth="~/t.csv", cells="~/c.json")
    assert (config.predictions, config.out) == (f"{tmp_path}/p.csv", f"{tmp_path}/scores")
    assert (config.truth, config.cells) == (f"{tmp_path}/t.csv", f"{tmp_path}/c.json")
    assert EvaluateConfig(predictions="./~", out="a~b").predictions == "./~"
