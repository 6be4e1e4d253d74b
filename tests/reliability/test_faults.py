"""Output folders that misbehave: full, read-only, without hard links, none at all. Nothing is ever half done."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from reliability_ranks import Executions, Family, units_done, units_held, wait_for
from reliability_samples import as_ordinary_user
from small_world import draw_jpeg, make_shards, tree_bytes, write_tar

from geoloc_batch.cli import main
from geoloc_batch.store.verify import verify

FLAGS = ["--encoder", "demo", "--batch-size", "4"]
NUM_SHARDS, PHOTOS_EACH, NOTE_BYTES = 8, 5, 450_000
BEAT_S = 0.5

Mount = Callable[[str], Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards whose metadata is heavy: their results fill a small disk."""
    folder = tmp_path_factory.mktemp("heavy")
    for shard in range(NUM_SHARDS):
        members = []
        for row in range(PHOTOS_EACH):
            seed = PHOTOS_EACH * shard + row
            members.append((f"{row}.jpg", draw_jpeg(seed)))
            note = random.Random(seed).randbytes(NOTE_BYTES).hex()
            members.append((f"{row}.json", json.dumps({"note": note}).encode()))
        write_tar(folder / f"{shard:06d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(["embed", str(shards), "--out", str(out), *FLAGS]) == 0
    return tree_bytes(out)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a small disk in memory; the test is skipped where this user must not."""
    with ExitStack() as mounted:

        def mount(size: str) -> Path:
            folder = tmp_path / "disk"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("mounting a tmpfs takes root")
            mounted.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
            return folder

        yield mount


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def embed(shards: Path, out: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    capsys.readouterr()
    code = main(["embed", str(shards), "--out", str(out), *FLAGS])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


def check_only_missing(out: Path) -> None:
    """What is published is whole; the rest is not there at all."""
    found = verify(out)
    assert 0 < found.missing <= found.units == NUM_SHARDS
    assert [problem for problem in found.problems if "units are not done" not in problem] == []
    assert found.duplicates == 0


def test_a_disk_that_fills_up_ends_the_run_and_the_next_one_completes_it(
    shards: Path, undisturbed: dict[str, bytes], mount: Mount, capsys: pytest.CaptureFixture[str]
) -> None:
    size_mb = sum(map(len, undisturbed.values())) / 1e6
    assert size_mb > 14
    disk = mount("14m")
    code, said = embed(shards, disk / "out", capsys)
    assert code == 1, said
    assert "No space left on device" in said
    check_only_missing(disk / "out")
    # Until there is space it says so at once.
    code, said = embed(shards, disk / "out", capsys)
    assert code == 2
    assert "free some space" in said
    remount(disk, "size=64m")
    assert embed(shards, disk / "out", capsys)[0] == 0
    assert verify(disk / "out").ok
    assert tree_bytes(disk / "out") == undisturbed
    assert list((disk / "out" / "_staging").iterdir()) == []


def test_a_disk_that_turns_read_only_is_misuse_until_it_can_be_written(
    mount: Mount, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "shards", [3])
    disk = mount("32m")
    remount(disk, "ro")
    code, said = embed(tmp_path / "shards", disk / "out", capsys)
    assert code == 2
    assert "Read-only file system; make it writable for this user, or give another --out" in said
    remount(disk, "rw")
    assert embed(tmp_path / "shards", disk / "out", capsys)[0] == 0
    remount(disk, "ro")
    assert verify(disk / "out").ok


def test_a_folder_that_this_user_cannot_write_is_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "shards", [3])
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with as_ordinary_user():
        for out in (locked, locked / "out"):
            code, said = embed(tmp_path / "shards", out, capsys)
            assert code == 2
            assert "Permission denied; make it writable for this user, or give another --out" in said
    assert list(locked.iterdir()) == []
    locked.chmod(0o755)


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "hf://datasets/me/run", "https://host/run"])
def test_an_object_store_as_output_is_refused_with_the_remedy(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "shards", [3])
    monkeypatch.chdir(tmp_path)
    code, said = embed(tmp_path / "shards", url, capsys)
    assert code == 2
    assert "write to a local or shared folder and copy that when it is complete" in said
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.slow
def test_without_hard_links_ranks_publish_by_renaming_folders(tmp_path: Path) -> None:
    refuse = ["-e", "trace=link,linkat", "-e", "inject=link,linkat:error=EPERM"]
    strace = ["strace", "-f", "--seccomp-bpf", "-qqq", "-o", "/dev/null", *refuse]
    if not shutil.which("strace") or subprocess.run([*strace, "true"], capture_output=True).returncode:
        pytest.skip("strace is absent or must not trace")
    shards = [f"pipe:sleep 0.1; cat {path}" for path in make_shards(tmp_path / "shards", [3] * NUM_SHARDS)]
    linked, out = tmp_path / "linked", tmp_path / "renamed"
    assert main(["embed", *shards, "--out", str(linked), *FLAGS]) == 0
    family = Family(tmp_path, under=strace)
    try:
        with Executions(out) as executions:
            ranks = [family.start("embed", *shards, "--out", out, "--heartbeat-s", BEAT_S, *FLAGS) for _ in range(2)]
            wait_for(lambda: units_done(out) and units_held(out, ranks[0].pid), "the rank takes no unit")
            ranks[0].kill()
            assert ranks[1].wait() == 0
            assert max(executions.by_unit().values()) <= 2
        assert family.run("verify", out) == 0
    finally:
        family.close()
    # What was published is a folder that holds one file of its own name.
    for name in ("run.json", "plan.parquet", "_done/000/000000.json"):
        assert (out / name / Path(name).name).is_file()
    files = {name.removesuffix("/plan.parquet"): data for name, data in tree_bytes(out).items()}
    assert files == tree_bytes(linked)
