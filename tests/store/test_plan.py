"""Units are pinned at first sight: appended shards get new indexes and nothing is renumbered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import CONFIG, make_units, work

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store import adoption
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.plan import match_plan, read_plan


def adopt(out: Path, units: list[Unit], *, is_worked: bool = False) -> tuple[list[Unit], Ledger]:
    ledger = Ledger(out)
    ledger.open(CONFIG)
    adopted = ledger.adopt_plan(units)
    if is_worked:
        list(work(ledger))
    ledger.close()
    return adopted, ledger


def test_appended_shards_get_new_indexes_whatever_their_place(tmp_path: Path) -> None:
    old, new = make_units(3), make_units(2, first=3)
    adopt(tmp_path, old)

    adopted, _ = adopt(tmp_path, [new[1], *reversed(old), new[0]])

    assert [(unit.index, unit.source) for unit in adopted] == [
        *((unit.index, unit.source) for unit in old),
        (3, new[1].source),
        (4, new[0].source),
    ]
    assert pq.read_table(tmp_path / "plan.parquet")["source"].to_pylist() == [unit.source for unit in old]
    assert pq.read_table(tmp_path / "plan_000001.parquet")["index"].to_pylist() == [3, 4]


def test_a_second_rank_with_the_same_shards_adds_no_part(tmp_path: Path) -> None:
    first, _ = adopt(tmp_path, make_units(3))
    second, _ = adopt(tmp_path, make_units(3))

    assert first == second
    assert not list(tmp_path.glob("plan_*"))


def test_ranks_that_append_different_shards_at_once_agree_on_the_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.open(CONFIG)
    second.open(CONFIG)
    shards = make_units(4)
    is_first_try = True

    # The other rank's part is published between this rank's look and its own part.
    append = adoption.append

    def late(*arguments: Any, **options: Any) -> None:
        nonlocal is_first_try
        if is_first_try:
            is_first_try = False
            first.adopt_plan(shards[:2])
        append(*arguments, **options)

    monkeypatch.setattr(adoption, "append", late)
    adopted = second.adopt_plan(shards[1:])

    assert [(unit.index, unit.source) for unit in adopted] == [(i, shards[i].source) for i in (1, 2, 3)]
    first.close()
    second.close()


def test_shards_that_are_no_longer_given_stay_pinned_and_are_left_alone(tmp_path: Path) -> None:
    shards = make_units(4)
    adopt(tmp_path, shards)

    adopted, _ = adopt(tmp_path, shards[2:], is_worked=True)

    assert [unit.index for unit in adopted] == [2, 3]
    assert sorted(path.stem for path in (tmp_path / "_done").rglob("*.json")) == ["000002", "000003"]
    assert adopt(tmp_path, shards)[0] == shards


def test_a_shard_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shards/00000\.tar is given twice"):
        adopt(tmp_path, [*make_units(2), make_units(1)[0]])


def test_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        adopt(tmp_path, [Unit(index=0, kind="shard", source="shards/\udcff.tar")])


def test_a_shard_that_changed_before_it_was_read_is_read_as_it_is_with_a_warning(tmp_path: Path) -> None:
    shards = make_units(2)
    adopt(tmp_path, shards)
    grown = dataclasses.replace(shards[1], num_bytes=5000)

    adopted, ledger = adopt(tmp_path, [shards[0], grown])

    assert adopted[1].num_bytes == 5000
    assert len(ledger.warnings) == 1
    assert "5000" in ledger.warnings[0]


def test_a_shard_that_changed_after_it_was_done_stays_done_with_a_warning(tmp_path: Path) -> None:
    shards = make_units(2)
    adopt(tmp_path, shards, is_worked=True)

    adopted, ledger = adopt(tmp_path, [shards[0], dataclasses.replace(shards[1], num_bytes=5000)])

    assert adopted == shards
    assert "its rows stay" in ledger.warnings[0]


def ranges(size: int, cut: int) -> list[Unit]:
    return [
        Unit(index=0, kind="shard", source="big.tar", num_bytes=cut, start=0, stop=cut),
        Unit(index=1, kind="shard", source="big.tar", num_bytes=size - cut, start=cut, stop=None, first_row=10),
    ]


def test_a_tar_whose_ranges_are_half_done_may_not_change() -> None:
    with pytest.raises(OutputError, match=r"big\.tar had 1000 bytes .* 1200 now"):
        match_plan(ranges(1000, 512), ranges(1200, 512), {0}.__contains__)
    assert match_plan(ranges(1000, 512), ranges(1200, 512), {0, 1}.__contains__)[0] == ranges(1000, 512)


def test_a_size_that_is_not_known_is_not_compared() -> None:
    pinned = [Unit(index=0, kind="shard", source="pipe:cat a.tar", num_bytes=0)]
    given = [Unit(index=7, kind="shard", source="pipe:cat a.tar", num_bytes=900)]

    assert match_plan(pinned, given, lambda unit: False) == (pinned, [], [])


def test_another_limit_is_refused() -> None:
    trial = [dataclasses.replace(make_units(1)[0], max_rows=5)]

    with pytest.raises(OutputError, match=r"with its first 5 photos and is now given with all .* --limit is another"):
        match_plan(trial, make_units(1), lambda unit: True)


def test_a_shard_that_was_replaced_by_a_larger_one_is_not_blamed_on_the_limit_alone() -> None:
    pinned = make_units(1)
    larger = [dataclasses.replace(pinned[0], max_rows=20, num_bytes=5000)]

    with pytest.raises(OutputError, match=r"with its first 20 photos: either --limit .* or this shard, or one before"):
        match_plan(pinned, larger, lambda unit: True)


def test_a_plan_with_a_lost_part_is_refused(tmp_path: Path) -> None:
    adopt(tmp_path, make_units(2))
    adopt(tmp_path, make_units(4))
    (tmp_path / "plan.parquet").unlink()
    (tmp_path / "plan_000001.parquet").rename(tmp_path / "plan.parquet")

    with pytest.raises(OutputError, match="gaps or doubles"):
        adopt(tmp_path, make_units(4))


def test_no_flipped_byte_of_the_plan_changes_a_unit_or_ends_in_a_traceback(tmp_path: Path) -> None:
    adopt(tmp_path, make_units(3))
    path = tmp_path / "plan.parquet"
    whole, (units, _) = path.read_bytes(), read_plan(tmp_path)
    refusals = []
    for position in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        try:
            assert read_plan(tmp_path, lambda asked, data=bytes(changed): look(asked, path, data)) == (units, 1)
        except OutputError as error:
            refusals.append(str(error))

    assert len(refusals) > len(whole) / 8
    assert all(f"{path} is not a plan, or was changed" in told for told in refusals)


def look(asked: Path, path: Path, data: bytes) -> bytes:
    """A machine that holds one file."""
    if asked != path:
        raise FileNotFoundError
    return data


@pytest.mark.parametrize("column", ["source", "index", "num_bytes"])
def test_a_plan_with_other_columns_or_without_values_is_refused(tmp_path: Path, column: str) -> None:
    adopt(tmp_path, make_units(3))
    table = pq.ParquetFile(tmp_path / "plan.parquet").read().replace_schema_metadata()
    place = table.column_names.index(column)
    kind = table.schema.field(column).type
    for changed in (
        table.drop_columns([column]),
        table.set_column(place, column, pa.nulls(3, kind)),
        table.set_column(place, column, pa.array([1.5, 2.5, 3.5])),
    ):
        pq.write_table(changed, tmp_path / "plan.parquet")
        with pytest.raises(OutputError, match="not a plan, or was changed"):
            adopt(tmp_path, make_units(3))


@pytest.mark.parametrize("name", ["plan.parquet", "run.json", "_done/000/000001.json"])
def test_a_folder_where_a_file_was_published_is_refused_by_name(tmp_path: Path, name: str) -> None:
    adopt(tmp_path, make_units(2), is_worked=True)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()

    with pytest.raises(OutputError, match=r"is a folder without the file .* put that back, or remove the folder"):
        adopt(tmp_path, make_units(2))[1].totals()
