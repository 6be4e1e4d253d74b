"""What a locator of heads refuses, and what it is known by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch
from torch import Tensor

import geoloc_batch
from geoloc_batch.errors import ConfigError, HeadError, PartitionError
from geoloc_batch.geo.partition import Partition
from geoloc_batch.locate.head import HeadLocator, load_head

SIZES = [(1, 5), (2, 1), (3, 64), (37, 48), (63, 51), (129, 1024), (1025, 33), (1898, 1024)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2, 69])
def test_a_row_that_is_not_finite_is_an_error_that_names_it(bad: float, row: int) -> None:
    features = samples.make_features(70, 48)
    features[row, 17] = bad
    with pytest.raises(ValueError, match=f"row {row} of the features holds NaN or infinite values"):
        samples.make_locator(37, 48).locate(features)


@pytest.mark.parametrize("shape", [(48,), (2, 47), (2, 49), (2, 4, 48), (0, 47)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"head takes features of shape \[B, 48\], got \["):
        samples.make_locator(37, 48).locate(torch.ones(shape))


def test_load_head_is_what_the_package_offers(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path, num_cells=11, dim=6)
    locator = geoloc_batch.load_head(path, tmp_path / "geocell_info.json", top_k=2, position="mean", name="north")
    assert (locator.name, locator.dim, locator.tap, locator.top_k) == ("north", 6, "pooled", 2)
    features = samples.make_features(5, 6)
    in_memory = load_head(str(path), samples.make_partition(11), top_k=2, position="mean")
    assert samples.same_bits(locator.locate(features), in_memory.locate(features))
    assert in_memory.name == "head"
    assert locator.to("cpu") is locator
    assert locator.device == torch.device("cpu")


def test_identity_changes_with_the_head_and_the_cells_and_with_nothing_else(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path / "a")
    cells = tmp_path / "a" / "geocell_info.json"
    first = load_head(path, cells).identity
    assert set(first) == {"head_sha256", "cells_sha256", "num_cells", "dim", "tap"}
    assert (first["num_cells"], first["dim"], first["tap"]) == (7, 5, "pooled")
    (tmp_path / "b").mkdir()
    moved = tmp_path / "b" / "other.pt"
    moved.write_bytes(path.read_bytes())
    assert load_head(moved, cells, top_k=1, position="mean", name="x").identity == first
    assert load_head(samples.write_head(tmp_path / "c", seed=1), cells).identity["head_sha256"] != first["head_sha256"]
    assert load_head(path, samples.make_partition(7, seed=1)).identity["cells_sha256"] != first["cells_sha256"]


def test_a_head_and_cells_of_different_sizes_are_refused(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path, num_cells=7)
    samples.make_partition(6).save(tmp_path / "six.json")
    with pytest.raises(HeadError, match=r"best.pt chooses among 7 cells, .*six.json has 6; give the .* \(--cells\)"):
        load_head(path, tmp_path / "six.json")


def test_cells_whose_ids_do_not_index_the_heads_rows_are_refused(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path, num_cells=3)
    for ids in ([1, 2, 3], [0, 1, 5]):
        partition = Partition(ids=np.array(ids), centroids_deg=np.zeros((3, 2)), source="gaps.json")
        with pytest.raises(HeadError, match=rf"gaps.json: ids must be 0 to 2 .* found the id {ids[-1]}; renumber"):
            load_head(path, partition)


def test_a_head_that_names_its_cells_refuses_others_of_the_same_number() -> None:
    own, other = samples.make_partition(7), samples.make_partition(7, seed=1)
    head = samples.head_of(samples.make_state(7, 5), partition_fingerprint=own.fingerprint)
    HeadLocator(head, own)
    with pytest.raises(HeadError, match=rf"fingerprint {own.fingerprint[:12]}, not {other.fingerprint[:12]}.*--cells"):
        HeadLocator(head, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "--top-k must be at least 1, got 0"),
        ({"position": "median"}, "--position must be auto, top1 or mean, got 'median'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        samples.make_locator(7, 5, **options)


def test_cells_that_are_no_partition_are_refused_as_such(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(PartitionError, match=r"bad.json must hold an object"):
        load_head(path, tmp_path / "bad.json")


def test_features_that_need_gradients_are_located_without_any() -> None:
    features: Tensor = samples.make_features(2, 48).requires_grad_()
    assert samples.same_bits(
        samples.make_locator(37, 48).locate(features), samples.make_locator(37, 48).locate(features.detach())
    )
    assert features.grad is None
