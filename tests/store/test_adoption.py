"""Which units a command gets: a shard is one under any spelling, and no index that is done is given out again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import CONFIG, make_units, run_rank, tree, work

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.plan import PLAN_SCHEMA, load_plan
from geoloc_batch.store.verify import verify


class Impatient(OsFiles):
    def sleep(self, seconds: float) -> None:
        """A test need not wait for a file server."""


def adopt(out: Path | str, *sources: str, is_worked: bool = False, **fields: int) -> tuple[list[Unit], Ledger]:
    ledger = Ledger(out, files=Impatient())
    ledger.open(CONFIG)
    try:
        units = [Unit(index=number, kind="shard", source=source, **fields) for number, source in enumerate(sources)]
        adopted = ledger.adopt_plan(units)
        if is_worked:
            list(work(ledger))
            totals = ledger.totals()
            assert totals.done == totals.units
        return adopted, ledger
    finally:
        ledger.close()


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards in a folder, and the working folder above it."""
    folder = tmp_path / "photos" / "shards"
    folder.mkdir(parents=True)
    for name in ("a.tar", "b.tar"):
        (folder / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path / "photos")
    return folder


@pytest.mark.parametrize(
    ("pinned", "here", "given", "opened"),
    [
        ("shards/a.tar", ".", "./shards/../shards//a.tar", "shards/a.tar"),
        ("shards/a.tar", ".", "{root}/photos/shards/a.tar", "shards/a.tar"),
        ("{root}/photos/shards/a.tar", ".", "shards/a.tar", "{root}/photos/shards/a.tar"),
        ("shards/a.tar", ".", "linked/a.tar", "shards/a.tar"),
        ("linked/a.tar", ".", "{root}/photos/shards/a.tar", "linked/a.tar"),
        ("shards/a.tar", ".", "other.tar", "shards/a.tar"),
        # From another working folder the pinned spelling leads nowhere: the given one is opened.
        ("shards/a.tar", "shards", "a.tar", "a.tar"),
        ("shards/a.tar", "..", "photos/linked/a.tar", "photos/linked/a.tar"),
        ("{root}/photos/shards/a.tar", "shards", "a.tar", "{root}/photos/shards/a.tar"),
    ],
)
def test_a_shard_under_another_spelling_is_the_same_shard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: str, here: str, given: str, opened: str
) -> None:
    Path("linked").symlink_to("shards")
    Path("other.tar").symlink_to("linked/a.tar")
    out = tmp_path / "out"
    pinned, given, opened = (text.format(root=tmp_path) for text in (pinned, given, opened))
    first, _ = adopt(out, pinned, is_worked=True)
    before = tree(out)
    monkeypatch.chdir(here)

    adopted, ledger = adopt(out, given, is_worked=True)

    assert [(unit.index, unit.source) for unit in adopted] == [(first[0].index, opened)]
    assert Path(adopted[0].source).read_bytes() == b"a.tar"
    assert ledger.warnings == []
    assert tree(out) == before
    assert not (out / "plan_000001.parquet").exists()
    assert verify(out).ok


def test_units_left_by_a_run_from_another_folder_are_finished_under_their_pinned_source(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    adopt(out, "shards/a.tar", "shards/b.tar")
    monkeypatch.chdir(shards)

    adopt(out, "b.tar", "a.tar", is_worked=True)

    markers = [json.loads(path.read_text()) for path in sorted((out / "_done/000").iterdir())]
    assert [marker["source"] for marker in markers] == ["shards/a.tar", "shards/b.tar"]
    assert verify(out).ok
    monkeypatch.chdir("..")
    assert [unit.source for unit in adopt(out, "shards/a.tar", is_worked=True)[0]] == ["shards/a.tar"]


def test_a_folder_that_was_moved_whole_holds_the_same_shards_and_says_so(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt("out", "shards/a.tar", "shards/b.tar", is_worked=True)
    (tmp_path / "photos").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")

    adopted, ledger = adopt("out", "shards/a.tar", "shards/b.tar")

    assert [(unit.index, unit.source) for unit in adopted] == [(0, "shards/a.tar"), (1, "shards/b.tar")]
    (warning,) = ledger.warnings
    assert warning.startswith("2 of the shards lie elsewhere")
    assert "shards/a.tar" in warning


def test_new_shards_with_name_and_size_of_ones_that_are_gone_are_told_of_and_not_taken_for_them(
    shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    adopt(out, "shards/a.tar", "shards/b.tar", is_worked=True, num_bytes=5)
    shutil.copytree(shards, "copied")
    _, ledger = adopt(out, "copied/a.tar", "copied/b.tar", is_worked=True, num_bytes=5)
    # The old ones are still there: equal names and sizes are nothing to tell of.
    assert ledger.warnings == []
    shutil.rmtree("copied")
    shards.rename("moved")

    adopted, ledger = adopt(out, "moved/a.tar", "moved/b.tar", num_bytes=5)

    assert [(unit.index, unit.source) for unit in adopted] == [(4, "moved/a.tar"), (5, "moved/b.tar")]
    (warning,) = ledger.warnings
    assert warning.startswith("2 of the shards have the name and size of shards that were planned before and are gone")
    assert "does shards/a.tar now lie at moved/a.tar?" in warning
    assert adopt(out, "moved/a.tar", "moved/b.tar", num_bytes=5)[1].warnings == []
    assert adopt(out, "other/a.tar", num_bytes=6)[1].warnings == []
    # No size is known of either.
    for source in ("unknown/a.tar", "elsewhere/a.tar"):
        assert adopt(out, source)[1].warnings == []


def test_a_shard_that_is_found_again_is_not_sought_elsewhere(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    adopt(out, "shards/a.tar", num_bytes=5)
    (tmp_path / "photos").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")

    (warning,) = adopt(out, "shards/a.tar", "other/a.tar", num_bytes=5)[1].warnings
    assert "lie elsewhere" in warning


def test_an_out_that_was_moved_with_its_own_shards_knows_them(shards: Path) -> None:
    Path("pred/_shards").mkdir(parents=True)
    Path("pred/_shards/000000.tar").write_bytes(b"packed")
    adopt("pred", "pred/_shards/000000.tar", is_worked=True)
    Path("pred").rename("moved")

    adopted, ledger = adopt("moved", "moved/_shards/000000.tar")

    assert [(unit.index, unit.source) for unit in adopted] == [(0, "moved/_shards/000000.tar")]
    assert ledger.warnings == []


def test_another_file_with_the_name_of_a_pinned_one_is_refused_until_it_is_named_in_full(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(shards, elsewhere / "shards")
    adopt(out, "shards/a.tar", is_worked=True)
    monkeypatch.chdir(elsewhere)

    with pytest.raises(InputError, match=r"shards/a\.tar was planned as .*/photos/shards/a\.tar.* absolute path"):
        adopt(out, "shards/a.tar")
    mine, theirs = str(elsewhere / "shards/a.tar"), str(shards / "a.tar")
    adopted, _ = adopt(out, mine, theirs)
    assert [(unit.index, unit.source) for unit in adopted] == [(0, theirs), (1, mine)]


def test_one_shard_under_two_spellings_in_one_command_is_given_twice(shards: Path, tmp_path: Path) -> None:
    Path("link.tar").symlink_to("shards/b.tar")
    adopt(tmp_path / "out", "shards/a.tar")

    for sources in (["shards/b.tar", "shards/a.tar", "link.tar"], ["./shards/a.tar", "shards/a.tar"]):
        with pytest.raises(InputError, match=rf"{sources[-1]} is given twice \(also as {sources[0]}\)"):
            adopt(tmp_path / "out", *sources)


def test_commands_and_addresses_are_compared_as_they_are_written(tmp_path: Path) -> None:
    sources = ("pipe:cat a.tar", "pipe:cat ./a.tar", "http://host/a.tar", "HTTPS://host/b/../a.tar")
    adopted, _ = adopt(tmp_path, *sources)

    assert [unit.source for unit in adopt(tmp_path, *sources)[0]] == [unit.source for unit in adopted] == [*sources]
    assert load_plan(tmp_path).places == {}


def old_plan(out: Path) -> pa.Table:
    """The first part of the plan as older versions wrote it: without places, and without a hash of its rows."""
    return pq.ParquetFile(out / "plan.parquet").read(PLAN_SCHEMA.names).replace_schema_metadata()


def test_a_plan_without_places_is_still_read(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adopt(out, "shards/a.tar")
    pq.write_table(old_plan(out), out / "plan.parquet")

    assert [unit.source for unit in adopt(out, str(shards / "a.tar"))[0]] == ["shards/a.tar"]
    assert load_plan(out).places == {}


def test_spellings_that_are_known_cost_no_look_at_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"shards/{number}.tar" for number in range(100)]
    adopt(tmp_path, *names)
    monkeypatch.setattr(os.path, "realpath", None)

    for given in (names, [os.path.abspath(name) for name in names]):
        assert [unit.source for unit in adopt(tmp_path, *given)[0]] == names


def remove_plan(out: Path) -> None:
    (out / "plan.parquet").unlink()


def remove_last_part(out: Path) -> None:
    (out / "plan_000001.parquet").unlink()


@pytest.mark.parametrize("harm", [remove_plan, remove_last_part])
def test_indexes_of_units_that_are_done_are_not_given_out_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    run_rank(tmp_path, 2)
    run_rank(tmp_path, 4)
    harm(tmp_path)
    before = tree(tmp_path)

    for sources in (["other/a.tar"], [unit.source for unit in make_units(4)]):
        with pytest.raises(
            OutputError, match=r"plan in .* does not have.*put it back as it was, or take another --out"
        ):
            adopt(tmp_path, *sources, is_worked=True)

    assert tree(tmp_path) == before
    assert not verify(tmp_path).ok


def test_a_part_of_the_plan_that_shows_later_than_its_units_is_waited_for(tmp_path: Path) -> None:
    class SlowServer(OsFiles):
        waited = 0.0

        def sleep(self, seconds: float) -> None:
            self.waited += seconds
            if self.waited > 1:
                hidden.rename(tmp_path / "plan_000001.parquet")

    run_rank(tmp_path, 2)
    run_rank(tmp_path, 4)
    hidden = (tmp_path / "plan_000001.parquet").rename(tmp_path / "_logs" / "hidden")
    ledger = Ledger(tmp_path, files=SlowServer())
    ledger.open(CONFIG)

    assert len(ledger.adopt_plan(make_units(4))) == 4
    ledger.close()


def test_a_lost_part_in_the_middle_is_not_filled_with_other_units(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        adopt(tmp_path, *(f"{number}.tar" for number in range(count)))
    (tmp_path / "plan_000001.parquet").unlink()

    with pytest.raises(OutputError, match=r"plan_000002\.parquet and no plan_000001\.parquet"):
        adopt(tmp_path, "new.tar")
    (problem, *_) = verify(tmp_path).problems
    assert "plan_000002.parquet and no plan_000001.parquet" in problem


def test_a_marker_of_another_source_than_the_plan_says_does_not_count_as_done(tmp_path: Path) -> None:
    run_rank(tmp_path, 2)
    plan = old_plan(tmp_path)
    others = plan.set_column(2, "source", pa.array(["x.tar", plan["source"][1].as_py()]))
    pq.write_table(others, tmp_path / "plan.parquet")

    with pytest.raises(OutputError, match=r"unit 0 is shards/00000\.tar, the plan in .* says x\.tar: .*000000\.json"):
        adopt(tmp_path, "x.tar", is_worked=True)
    told = [problem for problem in verify(tmp_path).problems if "says x.tar" in problem]
    assert len(told) == 1
    (tmp_path / "_done/000/000000.json").unlink()
    adopt(tmp_path, "x.tar", is_worked=True)
    assert verify(tmp_path).ok
