"""A run killed with SIGKILL at any file operation resumes to the files of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_world import draw_jpeg, make_shards, write_tar

HERE = Path(__file__).parent


@pytest.mark.kill
def test_a_run_killed_at_any_file_operation_resumes_to_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the shim that kills")
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    shards = make_shards(tmp_path / "shards", [3])[0].parent
    write_tar(shards / "000001.tar", [("a.jpg", draw_jpeg(8)), ("b.jpg", b"no photo"), ("c.jpg", draw_jpeg(9))])
    command = [sys.executable, HERE / "killer.py", shim, shards, tmp_path]
    done = subprocess.run(
        command, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told["kills"])
    assert len(told["files"]) == 5  # two pairs and a file of errors
    # Each kind of operation was met, and many times: otherwise the shim sees nothing and nothing was tried.
    assert told["kills"].keys() == {"openat", "write", "fsync", "link", "rename", "unlink", "mkdir"}
    assert told["kills"]["link"] >= 4  # run.json, plan, two markers
    assert told["kills"]["rename"] >= 5
    assert min(told["kills"].values()) >= 4
