"""A rank that was given, or sees, something else than the first is told what differs, before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from geoloc_batch.errors import InputError
from geoloc_batch.train.agreement import check_same
from geoloc_batch.train.group import Group

HEAD = {
    "cells": 60,
    "loss": {"kind": "ce", "label_smoothing": 0.1},
    "seed": 0,
    "warm_start": None,
    "partition_fingerprint": "a" * 64,
    "split_sha256": "b" * 64,
}
OTHER = "c" * 64


class Second(Group):
    """Rank 1 of two; the first has HEAD twice, in a sweep."""

    def from_first(self, make: Any) -> Any:
        return [HEAD, {**HEAD, "seed": 1}], True

    def add(self, value: Tensor) -> None:
        raise StopIteration("it waits for the others")


def refused(*heads: dict[str, Any], is_sweep: bool = True) -> str:
    with pytest.raises(InputError) as refusal:
        check_same(Second(rank=1, size=2), heads, is_sweep=is_sweep)
    told, remedy = str(refusal.value).split(". Give all ranks the same command, ")
    assert remedy == "and files that are the same on all nodes"
    beginning = "rank 1 was given, or sees, something else than the first rank: "
    assert told.startswith(beginning)
    return told.removeprefix(beginning)


def both(**other: Any) -> list[dict[str, Any]]:
    return [{**HEAD, **other}, {**HEAD, "seed": 1, **other}]


def test_counts_and_flags_that_differ_are_told_with_both_values_once_and_without_the_digests_that_follow() -> None:
    told = refused(*both(cells=51, partition_fingerprint=OTHER, split_sha256=OTHER))
    assert told == "cells: the first rank has 60, this one 51"
    told = refused(*both(seed=3))
    assert told == "seed: the first rank has 0, this one 3; seed: the first rank has 1, this one 3"
    told = refused(*both(loss={"kind": "smooth", "tau_km": 75.0}, warm_start=OTHER))
    assert told.split("; ") == [
        'loss.kind: the first rank has "ce", this one "smooth"',
        "loss.label_smoothing: the first rank has 0.1, this one none",
        "warm_start: the first rank has none, this one cccccccccccc...",
        "loss.tau_km: the first rank has none, this one 75.0",
    ]


def test_where_digests_alone_differ_they_are_told() -> None:
    told = refused(*both(split_sha256=OTHER))
    assert told == "split_sha256: the first rank has bbbbbbbbbbbb..., this one cccccccccccc..."


def test_another_number_of_heads_is_told_and_so_is_a_sweep_that_is_none() -> None:
    assert refused(HEAD) == "the first rank trains 2 heads with --sweep, this one 1 head with --sweep"
    told = refused(*both(), is_sweep=False)
    assert told == "the first rank trains 2 heads with --sweep, this one 2 heads without --sweep"


def test_ranks_that_have_the_same_wait_until_all_have_compared() -> None:
    with pytest.raises(StopIteration, match="waits for the others"):
        check_same(Second(rank=1, size=2), [HEAD, {**HEAD, "seed": 1}], is_sweep=True)
    # There is nobody to wait for.
    check_same(Group(), [HEAD], is_sweep=False)
