"""A command killed with SIGKILL at any file operation, and run again, gives the files of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_world import draw_jpeg, make_shards, write_tar

from geoloc_batch.cli import main

HERE = Path(__file__).parent


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the shim that kills")
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    return shim


def killed(shim: Path, *arguments: object) -> Any:
    """What killer.py has to tell."""
    command = [sys.executable, HERE / "killer.py", shim, *arguments]
    done = subprocess.run(
        command, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told["kills"])
    # Each kind of operation was met, and many times: otherwise the shim sees nothing and nothing was tried.
    assert told["kills"].keys() == {"openat", "write", "fsync", "link", "rename", "unlink", "mkdir"}
    return told


@pytest.mark.kill
def test_a_run_killed_at_any_file_operation_resumes_to_the_files_of_an_undisturbed_one(
    shim: Path, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", [3])[0].parent
    write_tar(shards / "000001.tar", [("a.jpg", draw_jpeg(8)), ("b.jpg", b"no photo"), ("c.jpg", draw_jpeg(9))])
    told = killed(shim, "embed", shards, tmp_path)
    assert told["code"] == 3  # the damaged photo
    assert len(told["files"]) == 5  # two pairs and a file of errors
    assert told["kills"]["link"] >= 4  # run.json, plan, two markers
    assert told["kills"]["rename"] >= 5
    assert min(told["kills"].values()) >= 4


@pytest.mark.kill
def test_a_retry_killed_at_any_file_operation_is_done_by_the_next(shim: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", [3, 2])[0].parent
    sound = {path: path.read_bytes() for path in sorted(shards.iterdir())}
    first, second = sound
    first.write_bytes(sound[first][:-12000])
    write_tar(second, [("a.jpg", draw_jpeg(8)), ("b.jpg", b"no photo")])
    before = tmp_path / "before"
    assert main(["embed", str(shards), "--out", str(before), "--encoder", "demo", "--batch-size", "4"]) == 3
    assert (before / "errors" / "errors_000001.parquet").exists()
    for path, data in sound.items():
        path.write_bytes(data)
    told = killed(shim, "retry", shards, tmp_path)
    assert told["code"] == 0
    assert len(told["files"]) == 4  # two pairs; the file of errors has gone
    assert told["kills"]["link"] >= 2  # two markers
    assert told["kills"]["rename"] >= 5  # two pairs in, the errors out
