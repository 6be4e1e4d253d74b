"""Splits of the user's own, from a table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geoloc_batch.errors import InputError, SplitError
from geoloc_batch.train.split_file import read_split_file


def write(path: Path, rows: list[tuple[Any, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"split": [row[1] for row in rows], "key": [row[0] for row in rows]}), path)
    else:
        path.write_text("key,split\n" + "".join(f"{key},{split}\n" for key, split in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_gives_each_key_its_split(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("007", "train"), ("b/c", " Validation"), ("d", "TEST"), ("e", "dev"), ("f", "left out"), ("b/c", "val")]
    path = write(tmp_path / f"split.{suffix}", rows)
    np.testing.assert_array_equal(read_split_file(path, ["d", "007", "b/c", "007", "f", "e"]), [2, 0, 1, 0, -1, 1])
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_split_file(path, ["7", "d", "nobody"]), [-1, 2, -1])
    assert len(caplog.messages) == 1
    assert "2 of 3 keys are not in" in caplog.messages[0]
    assert "first '7'" in caplog.messages[0]


def test_codes_may_stand_for_names(tmp_path: Path) -> None:
    rows = [("a", 0), ("b", 1), ("c", 2), ("d", -1)]
    for suffix in ("csv", "parquet"):
        assert read_split_file(write(tmp_path / f"s.{suffix}", rows), list("abcd")).tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (
            [("a", "train"), ("b", "val"), ("a", "test")],
            SplitError,
            r"'a' stands in train \(row 1\) and in test; 1 rows",
        ),
        ([("a", "train"), ("b", "trian")], SplitError, "row 2 has the split 'trian'"),
        ([("x", "train")], SplitError, "3 of 3 keys are not in .*; it has 'x'"),
        ([], SplitError, "has no row"),
    ],
)
def test_a_file_that_cannot_be_a_split_is_refused(tmp_path: Path, rows: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        read_split_file(write(tmp_path / "split.csv", rows), ["a", "b", "c"])


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("image_path,set\na,train\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no column 'key'; did you mean 'image_path'"):
        read_split_file(tmp_path / "split.csv", ["a"])
    with pytest.raises(InputError, match="cannot be read"):
        read_split_file(tmp_path / "none.csv", ["a"])
