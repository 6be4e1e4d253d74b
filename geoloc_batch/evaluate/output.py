"""What an evaluation leaves in its folder: rows.parquet, metrics.md, metrics.json. A metrics.json is there last."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import OutputError
from geoloc_batch.evaluate.evaluation import Evaluation, format_table
from geoloc_batch.store.pin import refuse_object_store
from geoloc_batch.whole_file import in_one_move

SCHEMA_VERSION = 1
METRICS, TABLE, ROWS = "metrics.json", "metrics.md", "rows.parquet"
_KIND = "geoloc evaluation"
_PART = ".part"
_ROW_GROUP_ROWS = 1 << 20


def check_out(out: str) -> Path:
    """The folder of the results, before anything is computed: absent, empty, or that of an earlier evaluation.

    Raises:
        OutputError: it holds something else, which nothing here is to replace or to lie among.
    """
    refuse_object_store(out)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {out} is a file; name a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in names if name not in (METRICS, TABLE, ROWS) and not _is_part(name)]
    if strange:
        raise OutputError(
            f"--out {out} holds other files ({strange[0]}{', ...' if len(strange) > 1 else ''}); "
            f"name a new folder, or that of an earlier evaluation"
        )
    if METRICS in names and not _is_ours(folder / METRICS):
        raise OutputError(f"--out {out} holds a {METRICS} that `geoloc evaluate` did not write; name a new folder")
    return folder


def write(folder: Path, evaluation: Evaluation, rows: pa.Table) -> None:
    """Write the three files, each in one move; while they belong to different evaluations there is no metrics.json.

    Args:
        folder: as `check_out` gave it; made where it is not there.
        evaluation: the metrics.
        rows: one row for each true place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _is_part(path.name):
            path.unlink()
    values = {"kind": _KIND, "schema_version": SCHEMA_VERSION, **evaluation.by_name()}
    text = json.dumps({**values, "warnings": evaluation.warnings}, indent=1, ensure_ascii=False, allow_nan=False)
    table = rows.replace_schema_metadata({"schema_version": json.dumps(SCHEMA_VERSION)})
    (folder / METRICS).unlink(missing_ok=True)
    in_one_move(folder / ROWS, lambda part: _write_rows(part, table))
    in_one_move(folder / TABLE, lambda part: _write_text(part, format_table(evaluation) + "\n"))
    in_one_move(folder / METRICS, lambda part: _write_text(part, text + "\n"))


def _write_rows(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd", write_statistics=True, row_group_size=_ROW_GROUP_ROWS)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _is_part(name: str) -> bool:
    """What a killed evaluation left."""
    return name.endswith(_PART) and name.startswith(tuple(f".{own}." for own in (METRICS, TABLE, ROWS)))


def _is_ours(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("kind") == _KIND
