"""Packing that is killed, doubled, refused, or finds what cannot be packed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pack_samples import members, metas, write_photos

from geoloc_batch.errors import ConfigError, InputError, OutputError
from geoloc_batch.stream.pack import PackSummary, pack
from geoloc_batch.stream.packing.sources import Photo


def test_what_is_no_photo_is_counted_not_lost_in_silence(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", "a.jpg", ".trash/b.jpg", "._a.jpg", "c.heic", "d.heic", "README")
    (tmp_path / "in" / "lonely.json").write_text("{}")
    summary = pack(tmp_path / "in", tmp_path / "out")
    assert summary.photos == 1
    assert summary.ignored == {".heic": 2, ".json": 1, "hidden": 2, "no extension": 1}


def test_a_folder_that_holds_shards_is_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", "1.jpg", "2.jpg", "3.jpg")
    pack(tmp_path / "in", tmp_path / "out", shard_photos=1)
    with pytest.raises(OutputError, match=r"000000.tar already: choose another folder, or pass --overwrite"):
        pack(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3
    pack(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000.tar"]
    assert len(metas(tmp_path / "out" / "000000.tar")) == 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [("absent", "no such photo"), ("a.heic", "known kind"), ("empty", "it is empty"), ("s3://b/k", "download")],
)
def test_sources_that_give_nothing_are_named_with_the_remedy(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=expected):
        pack(source if "://" in source else tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for settings in ({"shard_photos": 0}, {"shard_mb": 0}, {"duplicates": "maybe"}):
        with pytest.raises(ConfigError):
            pack(tmp_path, tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match="no photos were given"):
        pack([], tmp_path / "out")
    with pytest.raises(OutputError, match="address"):
        pack(tmp_path, "s3://bucket/shards")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", "1.jpg")
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        pack(tmp_path / "in", tmp_path / "out")


_KILLED = """
import os, signal, sys
from geoloc_batch.stream import pack
def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
pack.pack(sys.argv[1], sys.argv[2], shard_photos=4, progress=progress)
"""


@pytest.mark.parametrize("photos_before_the_kill", [1, 6, 13])
def test_a_killed_pack_leaves_no_shard_and_a_second_one_is_like_an_undisturbed_one(
    tmp_path: Path, photos_before_the_kill: int
) -> None:
    write_photos(tmp_path / "in", *(f"{number:02d}.jpg" for number in range(13)))
    arguments = [tmp_path / "in", tmp_path / "out", str(photos_before_the_kill)]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").rglob("*.tar")) == []
    pack(tmp_path / "in", tmp_path / "out", shard_photos=4)
    pack(tmp_path / "in", tmp_path / "calm", shard_photos=4)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "calm")
    assert len(_contents(tmp_path / "out")) == 4


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_packs_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", *(f"{number}.jpg" for number in range(20)))
    script = "import sys, time; from geoloc_batch.stream.pack import pack\n"
    script += "pack(sys.argv[1], sys.argv[2], progress=lambda done, total: print(done, flush=True) or time.sleep(30))"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "in", tmp_path / "out"], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"1\n"
            with pytest.raises(OutputError, match="another pack is writing"):
                pack(tmp_path / "in", tmp_path / "out")
            assert other.poll() is None
        finally:
            other.kill()
    deadline = time.monotonic() + 10
    while other.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pack(tmp_path / "in", tmp_path / "out").photos == 20


def test_a_folder_that_changes_while_it_is_packed_is_told(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", *(f"{number}.jpg" for number in range(30)), "sub/30.jpg")

    def progress(done: int, total: int) -> None:
        write_photos(tmp_path / "in", "sub/late.jpg")

    with pytest.raises(InputError, match="changed while it was packed"):
        pack(tmp_path / "in", tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


# webdataset leaves the closing of its files to the collector.


class Packing:
    """pack in a thread of its own; a named pipe that it waits for is opened after a while, so that it comes back."""

    def __init__(self, pipe: Path, **settings: Any) -> None:
        self.summary: PackSummary | None = None
        thread = threading.Thread(target=self.run, args=(pipe.parent, settings))
        thread.start()
        thread.join(5)
        self.is_hung = thread.is_alive()
        while thread.is_alive():
            with suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            thread.join(0.1)

    def run(self, folder: Path, settings: dict[str, Any]) -> None:
        self.summary = pack(folder, folder.with_name("out"), **settings)


@pytest.mark.parametrize("name", ["b.jpg", "a.json"])
def test_a_named_pipe_among_the_photos_is_skipped_not_waited_for(tmp_path: Path, name: str) -> None:
    write_photos(tmp_path / "in", "a.jpg", "c.jpg")
    os.mkfifo(tmp_path / "in" / name)
    packing = Packing(tmp_path / "in" / name, skip_missing=True)
    assert not packing.is_hung
    assert packing.summary is not None
    photos = ["c.jpg"] if name == "a.json" else ["a.jpg", "c.jpg"]
    assert [name for name in members(tmp_path / "out" / "000000.tar") if name.endswith("jpg")] == photos
    with (tmp_path / "out" / "skipped.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == name.replace("json", "jpg")
    assert row["reason"] == "Not a regular file"


def test_a_name_that_no_file_can_have_is_skipped(tmp_path: Path) -> None:
    photo = Photo(where="list.csv line 2", path="a\0.jpg", file=Path("a\0.jpg"))
    assert photo.obstacle()
    with pytest.raises(OSError, match="null"):
        photo.read()
