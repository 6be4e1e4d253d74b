"""Remains: whether the embeddings of a run are still what its markers say, for a reader that takes all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.goal import reached_goals
from geoloc_batch.store.plan import read_plan
from geoloc_batch.store.standing import read_standing

FOLDERS = ("img_emb", "metadata")


@dataclass(frozen=True, kw_only=True, slots=True)
class Remains:
    """What is missing in an output folder."""

    num_undone: int
    """Units that are not done."""
    num_harmed: int
    """Done units of which a file is gone."""
    lost: str
    """The first such file, "" where there is none."""


def find_remains(out: Path) -> Remains:
    """Hold the embeddings that are there against the markers, by their names alone: columns may have been added.

    Raises:
        OutputError: the plan or a marker is broken.
    """
    names = OsFiles().names
    plan, _ = read_plan(out)
    there = {f"{folder}/{name}" for folder in FOLDERS for name in names(out / folder)}
    num_done = num_harmed = 0
    first = ""
    for standing in read_standing(out, reached_goals(out, range(len(plan)), names).values()):
        num_done += 1
        lost = [path for path in standing.marker.paths if path.rpartition("/")[0] in FOLDERS and path not in there]
        num_harmed += bool(lost)
        first = first or next((str(out / path) for path in lost), "")
    return Remains(num_undone=len(plan) - num_done, num_harmed=num_harmed, lost=first)
