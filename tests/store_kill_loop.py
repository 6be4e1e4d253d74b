"""Kill a two-unit run at its N-th step, for every N until it runs through, and resume it: each time the same files.

Run as a program, so that the processes are forked from one that has no threads and need not import anything again.

    python store_kill_loop.py FOLDER links|no-links FIRST STEP [again]

With `again` the second process is killed too, at another step, and the third one resumes.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pandas  # noqa: F401  pyarrow imports it when it finds it: once here rather than once a process
from store_samples import die_at, run_rank, tree, write_known

from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.verify import verify

NUM_UNITS = 2
# A lease that its owner was killed over before its name stood in it is dead only when its time says so.
BEAT_S = 0.02


class QuickFiles(OsFiles):
    """Nothing is brought to the disk: a killed process leaves its bytes to the kernel all the same."""

    def sync(self, path: Path) -> None:
        assert path.exists()


def refuse_links(files: OsFiles) -> OsFiles:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    files.link = link  # type: ignore[method-assign]
    return files


def forked(task: Callable[..., None], *arguments: object) -> int:
    """Wait status of a process that does `task(*arguments)`."""
    pid = os.fork()
    if pid == 0:
        try:
            task(*arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def run(out: Path, files: OsFiles, known: dict[str, bytes]) -> None:
    run_rank(out, NUM_UNITS, lambda execution: write_known(execution, known), beat_s=BEAT_S, files=files)


def resume_and_check(out: Path, files: OsFiles, expected: dict[str, bytes], what: str) -> None:
    run(out, files, expected)
    assert tree(out) == expected, f"{what}: other files than an undisturbed run"
    for folder in ("_staging", "_leases"):
        left = [name for name in os.listdir(out / folder) if name[0].isdigit()]
        assert not left, f"{what}: {left} stays in {folder}"


def main(folder: Path, wrap: Callable[[OsFiles], OsFiles], number: int, step: int, is_killed_again: bool) -> None:
    assert forked(lambda: run_rank(folder / "undisturbed", NUM_UNITS, files=wrap(QuickFiles()))) == 0
    expected = tree(folder / "undisturbed")
    assert len(expected) == 4 * NUM_UNITS
    out = folder / "out"
    status = -1
    while status != 0:
        shutil.rmtree(out, ignore_errors=True)
        status = forked(run, out, wrap(die_at(number, QuickFiles())), expected)
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        if is_killed_again:
            forked(run, out, wrap(die_at(1 + number * 7 % 60, QuickFiles())), expected)
        assert forked(resume_and_check, out, wrap(QuickFiles()), expected, f"killed at step {number}") == 0
        number += step
    found = verify(out)
    assert found.ok, found.problems
    print(number - step)


if __name__ == "__main__":
    folder, links, first, step, *again = sys.argv[1:]
    main(Path(folder), refuse_links if links == "no-links" else lambda files: files, int(first), int(step), bool(again))
