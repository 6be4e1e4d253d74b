"""The plan: every unit ever given to an OUT, with the index that names its files.

`plan.parquet` is the first rank's, `plan_000001.parquet` and on are what was appended. A part is published whole and
once, and never changed, so that an index stands for the same bytes for ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.places import Places, Source, restored_place, spelling, stored_place
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
NULLABLE = frozenset({"stop", "max_rows"})
PLACE = pa.field("place", pa.string())
"""Where the source lay when it was pinned (places.py); plans of older versions do not have it."""
HASH_KEY = b"rows_sha256"


@dataclass(frozen=True, slots=True)
class Plan:
    """Every pinned unit."""

    units: list[Unit]
    """In the order of their indexes, which run from 0 without a gap."""
    places: dict[int, str]
    """Where a unit's source lay when it was pinned, where that is known."""
    num_parts: int


def plan_name(part: int) -> str:
    """File name of a part of the plan."""
    return f"plan_{part:06d}.parquet" if part else "plan.parquet"


def plan_bytes(units: Iterable[Unit], out: Path) -> bytes:
    """A part of the plan in OUT, as Parquet."""
    sink = io.BytesIO()
    rows = [
        {**{name: getattr(unit, name) for name in PLAN_SCHEMA.names}, PLACE.name: stored_place(unit, out)}
        for unit in units
    ]
    # Parquet's own checksums cover its pages, and not what describes them.
    schema = PLAN_SCHEMA.append(PLACE).with_metadata({HASH_KEY: _rows_hash(rows)})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def _rows_hash(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest().encode()


def read_plan(out: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> tuple[list[Unit], int]:
    """The units of load_plan, and the number of parts."""
    plan = load_plan(out, read)
    return plan.units, plan.num_parts


def load_plan(out: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> Plan:
    """The plan that stands in OUT, without units where none does.

    Raises:
        OutputError: a part is no plan, or the indexes do not run from 0 without a gap.
    """
    rows: list[dict[str, Any]] = []
    part = 0
    while (data := read_published(out / plan_name(part), read)) is not None:
        try:
            rows += _parse_part(data)
        # Arrow's parsers say OSError too, though all bytes are at hand.
        except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
            raise OutputError(
                f"{out / plan_name(part)} is not a plan, or was changed ({error}); put it back as it was, or take "
                f"another --out"
            ) from error
        part += 1
    places = {row["index"]: restored_place(row.pop(PLACE.name), out) for row in rows if row.get(PLACE.name)}
    units = [Unit(**{name: row[name] for name in PLAN_SCHEMA.names}) for row in rows]
    if [unit.index for unit in units] != list(range(len(units))):
        raise OutputError(
            f"the plan in {out} has gaps or doubles; a part of it was removed or changed: take another --out"
        )
    return Plan(units, places, part)


def _parse_part(data: bytes) -> list[dict[str, Any]]:
    # In this thread alone: one of Arrow's own may let go of `data` so late that the interpreter is at its end, and
    # then the whole process aborts.
    table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
    schema = PLAN_SCHEMA.append(PLACE) if PLACE.name in table.column_names else PLAN_SCHEMA
    if not table.schema.equals(schema):
        raise ValueError("its columns are others")
    rows: list[dict[str, Any]] = table.to_pylist()
    hashed = (table.schema.metadata or {}).get(HASH_KEY)
    if hashed is not None and hashed != _rows_hash(rows):
        raise ValueError("its rows are not those that were written")
    for name in set(PLAN_SCHEMA.names) - NULLABLE:
        if table[name].null_count:
            raise ValueError(f"{name} is missing in a row")
    return rows


def match_plan(
    pinned: Sequence[Unit],
    given: Sequence[Unit],
    is_done: Callable[[int], bool],
    places: Mapping[int, str] | None = None,
) -> tuple[list[Unit], list[Unit], list[str]]:
    """Compare what the user gives with what is pinned.

    Units of one source belong together: the ranges of one large tar were cut together. A local source is the same
    under any spelling: relative or absolute, through a link, from another working folder.

    Args:
        pinned: from load_plan.
        given: the units as planned now; their indexes mean nothing.
        is_done: whether the unit with an index is committed.
        places: from load_plan.

    Returns:
        The pinned units whose source was given, with today's size, and spelt as they were pinned where that still
        leads to the file, else as given; the new units, with indexes that follow the pinned ones; warnings.

    Raises:
        InputError: a source is given twice, its name is not text, or is that of another file that was pinned.
        OutputError: a source is given in another way than it was pinned, and not all of it is done.
    """
    pinned_groups, given_groups = _by_source(pinned), _by_source(given)
    known = Places(pinned_groups, places or {})
    spelt: dict[Source, str] = {}
    adopted: list[Unit] = []
    fresh: list[Unit] = []
    warnings: list[str] = []
    for source, new in given_groups.items():
        found = known.find(new[0])
        if found in spelt:
            raise InputError(f"{source[1]} is given twice (also as {spelt[found]}); name each shard once")
        spelt[found or source] = source[1]
        if found is not None:
            old = pinned_groups[found]
            before, now = old[0].source, spelling(old[0].source, new[0])
            adopted += [
                dataclasses.replace(unit, source=now, pinned_source="" if now == before else before)
                for unit in _match_source(old, new, is_done, warnings)
            ]
            continue
        known.add(new[0])
        fresh += [dataclasses.replace(unit, index=len(pinned) + len(fresh) + number) for number, unit in enumerate(new)]
    if known.moved:
        warnings.append(
            f"{len(known.moved)} of the shards lie elsewhere than when they were planned, and are taken for the same "
            f"by their names, {known.moved[0]} being the first"
        )
    return sorted(adopted, key=lambda unit: unit.index), fresh, warnings


def _by_source(units: Iterable[Unit]) -> dict[Source, list[Unit]]:
    groups: dict[Source, list[Unit]] = {}
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
            f"{source} was planned {_shown_limit(old)} and is now given {_shown_limit(new)}: either --limit is another "
            f"than before, or this shard, or one before it, holds another number of photos than before; give the same "
            f"--limit and put the old files back, or take another --out"
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


def _shown_limit(units: Sequence[Unit]) -> str:
    max_rows = units[-1].max_rows
    return "with all of its photos" if max_rows is None else f"with its first {max_rows} photos"
