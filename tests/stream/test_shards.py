from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import pytest
from stream_samples import jpeg, numbered, tar_bytes, write_tar

from geoloc_batch.errors import ConfigError, InputError
from geoloc_batch.stream.shards import expand_shards, plan_units


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        write_tar(tmp_path / f"{number:03d}.tar", numbered(3, first=3 * number))
    (tmp_path / "more").mkdir()
    for name in ("b.tgz", "a.tar.gz", "c.tar", ".hidden.tar", "notes.txt"):
        (tmp_path / "more" / name).write_bytes(b"")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["003.tar", "001.tar"], ["003.tar", "001.tar"]),
        (["{009..011}.tar"], ["009.tar", "010.tar", "011.tar"]),
        (["00{2,0}.tar"], ["002.tar", "000.tar"]),
        (["01?.tar", "000.tar"], ["010.tar", "011.tar", "000.tar"]),
        (["{more,.}/[cb]*.t*"], ["more/b.tgz", "more/c.tar"]),
        (["more"], ["more/a.tar.gz", "more/b.tgz", "more/c.tar"]),
        (["mor?"], ["more/a.tar.gz", "more/b.tgz", "more/c.tar"]),
        (["pipe:cat {a,b}.tar"], ["pipe:cat {a,b}.tar"]),
        (["http://host/{00..02}.tar?x=1"], [f"http://host/{n:02d}.tar?x=1" for n in range(3)]),
    ],
)
def test_shards_are_expanded_in_the_order_given(given: list[str], meant: list[str]) -> None:
    if given == ["{more,.}/[cb]*.t*"]:
        with pytest.raises(InputError, match="matches no shard"):
            expand_shards(given)
        given = ["more/[cb]*.t*"]
    assert expand_shards(given) == meant


def test_an_existing_name_is_meant_as_it_stands(folder: Path) -> None:
    odd = folder / "odd[1]{a,b}*.tar"
    odd.write_bytes(b"")
    assert expand_shards([str(odd)]) == [str(odd)]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no shards were given"),
        ([""], "name is empty"),
        (["pipe: "], "names no command"),
        (["absent.tar"], "absent.tar does not exist; check"),
        (["{010..014}.tar"], r"012.tar does not exist \(3 shards are missing in all\)"),
        (["x*.tar"], "x\\*.tar matches no shard"),
        (["000.tar", "./000.tar"], "the shard ./000.tar is given twice \\(also as 000.tar\\)"),
        (["pipe:a", "pipe:a"], "pipe:a is given twice"),
        (["0{00..03}.tar", "*3.tar"], "003.tar is given twice"),
        (["{000..001.tar"], "braces do not match"),
        (["s3://bucket/a.tar"], "pipe:aws s3 cp s3://bucket/a.tar -"),
    ],
)
def test_what_gives_no_shard_is_refused_with_a_remedy(given: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        expand_shards(given)


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:abc/a.tar",
        "http://localhost:99999/a.tar",
        "http://localhost:0/a.tar",
        "http:///a.tar",
        "https://:443/a.tar",
        "http://[::1/a.tar",
        "http://local host/a.tar",
        "http://a..b/a.tar",
        "http://[{1,2}/a.tar",
        "http://user:secret@host/a.tar",
    ],
)
def test_a_malformed_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(InputError, match=re.escape(address.replace("{1,2}", "1"))) as caught:
        expand_shards([address])
    assert "write http://HOST[:PORT]/PATH" in str(caught.value)


def test_a_folder_without_shards_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="geoloc pack"):
        expand_shards([str(tmp_path)])


def test_units_are_numbered_and_know_their_sizes(folder: Path) -> None:
    shards = [*expand_shards(["00{0..3}.tar"]), "pipe:cat 005.tar"]
    units = plan_units(shards)
    assert [(unit.index, unit.kind, unit.source) for unit in units] == [
        (index, "shard", shard) for index, shard in enumerate(shards)
    ]
    assert [unit.num_bytes for unit in units] == [os.path.getsize(shard) for shard in shards[:4]] + [0]
    assert {(unit.start, unit.stop, unit.first_row, unit.max_rows) for unit in units} == {(0, None, 0, None)}


@pytest.mark.parametrize(
    ("limit", "rows"),
    [(1, [1]), (3, [3]), (4, [None, 1]), (7, [None, None, 1]), (36, [None] * 11 + [3]), (99, [None] * 12)],
)
@pytest.mark.usefixtures("folder")
def test_a_limit_takes_the_first_photos_in_the_order_of_the_shards(limit: int, rows: list[int | None]) -> None:
    units = plan_units(expand_shards(["*.tar"]), limit=limit)
    assert [unit.max_rows for unit in units] == rows


@pytest.mark.usefixtures("folder")
def test_a_limit_counts_streams_by_what_remains() -> None:
    units = plan_units(["000.tar", "pipe:cat 001.tar", "002.tar"], limit=5)
    assert [(unit.source, unit.max_rows) for unit in units] == [("000.tar", None), ("pipe:cat 001.tar", 2)]


@pytest.mark.usefixtures("folder")
def test_a_limit_counts_a_damaged_shard_up_to_its_damage(folder: Path) -> None:
    data = (folder / "000.tar").read_bytes()
    (folder / "000.tar").write_bytes(data[:3600])
    units = plan_units(["000.tar", "001.tar"], limit=3)
    assert [unit.max_rows for unit in units] == [None, 2]


def test_a_limit_below_1_is_refused() -> None:
    with pytest.raises(ConfigError, match="--limit must be at least 1, got 0"):
        plan_units(["pipe:true"], limit=0)


def test_a_tar_is_cut_near_the_split_size_between_groups(tmp_path: Path) -> None:
    members = [(f"{n:03d}.{view}.jpg", jpeg(seed=n)) for n in range(30) for view in range(2)]
    shard = write_tar(tmp_path / "a.tar", members)
    units = plan_units([shard], split_bytes=10_000)
    assert len(units) > 3
    assert all(10_000 <= unit.num_bytes < 10_000 + 8_000 for unit in units[:-1])
    assert all(unit.first_row % 2 == 0 for unit in units)
    assert units[-1].stop is None


@pytest.mark.parametrize("kind", ["cut", "doubled", "global header", "gzip", "small"])
def test_some_tars_stay_whole(tmp_path: Path, kind: str) -> None:
    members = [*numbered(20), *(numbered(1) if kind == "doubled" else [])]
    data = tar_bytes(members)
    if kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "global header":
        data = tar_bytes(members, tarfile.PAX_FORMAT, pax_headers={"comment": "for all"})
    elif kind == "gzip":
        import gzip

        data = gzip.compress(data)
    shard = tmp_path / "a.tar"
    shard.write_bytes(data)
    units = plan_units([str(shard)], split_bytes=1 << 30 if kind == "small" else 5000)
    assert [(unit.start, unit.stop, unit.num_bytes) for unit in units] == [(0, None, len(data))]
