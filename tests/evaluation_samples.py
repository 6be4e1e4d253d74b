"""What the tests of evaluate share: small tables of predictions and truth, and the evaluation of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.evaluate.comparison import evaluate
from geoloc_batch.evaluate.config import EvaluateConfig
from geoloc_batch.evaluate.evaluation import Evaluation
from geoloc_batch.geo.located import Located
from geoloc_batch.records import RowError, Sample, Unit
from geoloc_batch.store import tables

Columns = Mapping[str, Sequence[Any]]


def write_csv(path: Path, columns: Columns, delimiter: str = ",") -> Path:
    """A CSV; None is an empty field, all else stands as str gives it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = (delimiter.join("" if value is None else str(value) for value in row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: Columns | pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), path)
    return path


def write_either(path: Path, columns: Columns) -> Path:
    return write_csv(path, columns) if path.suffix == ".csv" else write_parquet(path, columns)


def run(folder: Path, predictions: Path | str, truth: Path | str = "", **flags: Any) -> Evaluation:
    """Evaluate into folder/scores."""
    given = {"out": str(folder / "scores"), **flags}
    return evaluate(EvaluateConfig(predictions=str(predictions), truth=str(truth), **given))


def compare(folder: Path, predictions: Columns, truth: Columns, **flags: Any) -> Evaluation:
    """Evaluate two tables that are written as CSV first."""
    return run(folder, write_csv(folder / "p.csv", predictions), write_csv(folder / "t.csv", truth), **flags)


def written_rows(folder: Path) -> list[dict[str, Any]]:
    """rows.parquet of an evaluation by `run`."""
    return list(pq.read_table(folder / "scores" / "rows.parquet").to_pylist())


def written_metrics(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "scores" / "metrics.json").read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def write_run(out: Path, shards: Sequence[int], tree: str = "", *, errors: Sequence[int] = (), seed: int = 5) -> None:
    """An OUT as `geoloc predict` leaves it: a file for each shard, photos 0, 1, ... with their truth in the json.

    Args:
        out: the folder.
        shards: photos in each.
        tree: the head, where there are several.
        errors: error rows of each.
        seed: of the places.
    """
    rng = np.random.default_rng(seed)
    for index, count in enumerate(shards):
        unit = Unit(index=index, kind="shard", source=f"shards/{index:02d}.tar")
        true = rng.uniform([36, -10], [70, 40], (count, 2))
        metas = [json.dumps({"lat": lat, "lon": lon, "cell": row % 3}).encode() for row, (lat, lon) in enumerate(true)]
        samples = [Sample(unit, unit.source, row, f"photos/{row:03d}", meta) for row, meta in enumerate(metas)]
        path = out / tables.predictions_path(index, tree)
        path.parent.mkdir(parents=True, exist_ok=True)
        tables.write_predictions(path, samples, _located(true + np.array([0.5, 0.0]), rng))
        if index < len(errors) and errors[index]:
            path = out / tables.errors_path(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            failed = [
                RowError(f"bad/{row}", unit.source, count + row, "decode", "damaged", False)
                for row in range(errors[index])
            ]
            tables.write_errors(path, failed)
    (out / "run.json").write_text(json.dumps({"layout": 1, "config": {}}), encoding="utf-8")


def _located(position_deg: np.ndarray, rng: np.random.Generator) -> Located:
    count = len(position_deg)
    topk_cell = np.stack([rng.permutation(9)[:5] for _ in range(count)]).astype(np.int32)
    return Located(
        position_deg=position_deg,
        topk_cell=topk_cell,
        topk_prob=np.tile(np.float32([0.4, 0.2, 0.1, 0.1, 0.1]), (count, 1)),
        mean_deg=position_deg,
        spread_km=np.ones(count, dtype=np.float32),
        entropy=np.ones(count, dtype=np.float32),
    )
