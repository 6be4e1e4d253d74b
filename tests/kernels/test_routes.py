"""Which way a head goes, by sizes; and every way, on the CPU under Triton's interpreter, against the definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoloc_kernels import routes
from geoloc_kernels.routes import route, row_chunks

PROGRAM = Path(__file__).resolve().parents[1] / "kernel_routes.py"


@pytest.mark.parametrize(
    ("num_rows", "num_cells", "num_sms", "expected"),
    [
        (1, 1, 132, "product"),
        (16384, 1898, 132, "product"),
        (64, 8192, 132, "product"),
        (64, 8193, 132, "split"),
        (1, 200_000, 132, "split"),
        (16384, 200_000, 132, "fused"),
        # 66 tiles of 128 rows would keep half of the chip at work.
        (8448, 200_000, 132, "split"),
        (8449, 200_000, 132, "fused"),
        (256, 200_000, 4, "split"),
        (257, 200_000, 4, "fused"),
    ],
)
def test_the_route_follows_from_the_sizes(num_rows: int, num_cells: int, num_sms: int, expected: str) -> None:
    assert route(num_rows, num_cells, num_sms) == expected


@given(st.integers(1, 70_000), st.integers(1, 8192), st.sampled_from([1 << 20, 40 << 20, 50 << 20]))
def test_chunks_of_rows_are_of_one_size_fit_into_the_cache_and_cover_all(rows: int, cells: int, l2_bytes: int) -> None:
    chunks = list(row_chunks(rows, cells, l2_bytes))
    assert len({chunk.stop - chunk.start for chunk in chunks}) == 1
    size = chunks[0].stop - chunks[0].start
    assert size == 1 or 4 * size * cells <= l2_bytes // 2
    assert (chunks[0].start, chunks[-1].stop) == (0, rows)
    for before, after in pairwise(chunks):
        assert before.start < after.start <= before.stop < after.stop
    # No more work than the size forces on it.
    assert len(chunks) == -(-rows // size)


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    """What the program tells, run where Triton interprets its kernels."""
    pytest.importorskip("triton")
    # The package may be found by pytest's own path alone.
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(routes.__file__).parents[1])]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_route_gives_what_the_definition_gives(interpreted: list[dict[str, Any]]) -> None:
    heads = [each for each in interpreted if each["op"] == "head"]
    assert {each["asked"] for each in heads} == {"product", "fused", "split"}
    for each in heads:
        assert each["ids_differ"] == 0, each
        assert each["lse_off"] <= 5e-6, each
        assert each["mean_off"] <= 1e-6, each
        assert each["logit_off"] <= 5e-6, each
        assert each["entropy_off"] <= 1e-5, each


def test_the_route_asked_for_is_the_one_taken_but_for_shuffled_cells(interpreted: list[dict[str, Any]]) -> None:
    for each in interpreted:
        if each["is_shuffled"] and each["asked"] == "product":
            assert each["taken"] == ["split"], each
        else:
            assert each["taken"] == [each["asked"]], each
    assert any(each["is_shuffled"] for each in interpreted)
    by_size = {(each["op"], each["asked"]) for each in interpreted if each.get("by_size")}
    assert by_size == {(op, way) for op in ("head", "bank") for way in ("fused", "split")} | {("head", "product")}


def test_the_banks_routes_find_what_the_definition_finds(interpreted: list[dict[str, Any]]) -> None:
    banks = [each for each in interpreted if each["op"] == "bank"]
    assert {each["asked"] for each in banks} == {"fused", "split"}
    for each in banks:
        assert each["ids_differ"] == 0, each
        assert each["logit_off"] <= 1e-6, each


def test_rows_that_are_not_finite_get_no_cell_on_any_route(interpreted: list[dict[str, Any]]) -> None:
    bad = [each for each in interpreted if each["bad_rows"]]
    assert {(each["op"], each["asked"]) for each in bad} >= {("head", way) for way in ("product", "fused", "split")}
    for each in bad:
        assert each["bad_found"] == each["bad_rows"], each
