"""The plan: every unit ever given to an OUT, with the index that names its files.

`plan.parquet` is the first rank's, `plan_000001.parquet` and on are what was appended. A part is published whole and
once, and never changed, so that an index stands for the same bytes for ever.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.publish import read_published

PLAN_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("kind", pa.string()),
        ("source", pa.string()),
        ("num_bytes", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("first_row", pa.int64()),
        ("max_rows", pa.int64()),
    ]
)


def plan_name(part: int) -> str:
    """File name of a part of the plan."""
    return f"plan_{part:06d}.parquet" if part else "plan.parquet"


def plan_bytes(units: Iterable[Unit]) -> bytes:
    """A part of the plan as Parquet."""
    sink = io.BytesIO()
    rows = [{name: getattr(unit, name) for name in PLAN_SCHEMA.names} for unit in units]
    pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def read_plan(out: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> tuple[list[Unit], int]:
    """Every pinned unit in the order of the indexes, and the number of parts.

    Raises:
        OutputError: a part is no plan, or the indexes do not run from 0 without a gap.
    """
    units: list[Unit] = []
    part = 0
    while (data := read_published(out / plan_name(part), read)) is not None:
        try:
            units += [Unit(**row) for row in pq.ParquetFile(io.BytesIO(data)).read(PLAN_SCHEMA.names).to_pylist()]
        except (pa.ArrowException, TypeError) as error:
            raise OutputError(f"{out / plan_name(part)} is not a plan ({error}); take another --out") from error
        part += 1
    if [unit.index for unit in units] != list(range(len(units))):
        raise OutputError(
            f"the plan in {out} has gaps or doubles; a part of it was removed or changed: take another --out"
        )
    return units, part


def match_plan(
    pinned: Sequence[Unit], given: Sequence[Unit], is_done: Callable[[int], bool]
) -> tuple[list[Unit], list[Unit], list[str]]:
    """Compare what the user gives with what is pinned.

    Units of one source belong together: the ranges of one large tar were cut together.

    Args:
        pinned: from read_plan.
        given: the units as planned now; their indexes mean nothing.
        is_done: whether the unit with an index is committed.

    Returns:
        The pinned units whose source was given, with today's size; the new units, with indexes that follow the pinned
        ones; warnings.

    Raises:
        InputError: a source is given twice, or its name is not text.
        OutputError: a source is given in another way than it was pinned, and not all of it is done.
    """
    pinned_groups, given_groups = _by_source(pinned), _by_source(given)
    adopted: list[Unit] = []
    fresh: list[Unit] = []
    warnings: list[str] = []
    for source, new in given_groups.items():
        old = pinned_groups.get(source)
        if old is None:
            fresh += [
                dataclasses.replace(unit, index=len(pinned) + len(fresh) + number) for number, unit in enumerate(new)
            ]
            continue
        adopted += _match_source(old, new, is_done, warnings)
    return sorted(adopted, key=lambda unit: unit.index), fresh, warnings


def _by_source(units: Iterable[Unit]) -> dict[tuple[str, str], list[Unit]]:
    groups: dict[tuple[str, str], list[Unit]] = {}
    starts: set[tuple[str, str, int]] = set()
    for unit in units:
        if (unit.kind, unit.source, unit.start) in starts:
            raise InputError(f"{unit.source} is given twice; name each shard once")
        starts.add((unit.kind, unit.source, unit.start))
        try:
            unit.source.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of {unit.source!r} is not UTF-8, so no table can hold it; rename it") from None
        groups.setdefault((unit.kind, unit.source), []).append(unit)
    return groups


def _match_source(
    old: Sequence[Unit], new: Sequence[Unit], is_done: Callable[[int], bool], warnings: list[str]
) -> list[Unit]:
    source = old[0].source
    if [unit.max_rows for unit in old] != [unit.max_rows for unit in new] and len(old) == len(new):
        raise OutputError(
            f"{source} was planned with at most {old[-1].max_rows} photos and is now given with {new[-1].max_rows} "
            f"(None: all); give the same --limit, or another --out"
        )
    ranges = [[(unit.start, unit.stop, unit.first_row) for unit in group] for group in (old, new)]
    old_bytes, new_bytes = (sum(unit.num_bytes for unit in group) for group in (old, new))
    # 0: the size is not known beforehand, there is nothing to compare.
    if ranges[0] == ranges[1] and (old_bytes == new_bytes or not old_bytes or not new_bytes):
        return list(old)
    if all(is_done(unit.index) for unit in old):
        warnings.append(f"{source} had {old_bytes} bytes when it was processed and has {new_bytes} now; its rows stay")
        return list(old)
    if len(old) == len(new) == 1:
        # Nothing of it is published yet, so there is nothing that the new bytes could be mixed with.
        warnings.append(
            f"{source} had {old_bytes} bytes when it was planned and has {new_bytes} now; it is read as it is"
        )
        return [dataclasses.replace(new[0], index=old[0].index)]
    raise OutputError(
        f"{source} had {old_bytes} bytes when its {len(old)} ranges were planned and has {new_bytes} now, and not all "
        f"ranges are done; put the old file back, or take another --out"
    )
