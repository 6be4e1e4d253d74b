"""Publishing: a whole file appears under its final name, once, or not at all.

With hard links the file is linked; without, its folder is renamed and the target is a folder that holds one file of
its own name. Each of the two refuses a target that the other one made, so ranks that see OUT through different mounts
still have one winner.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import FilePort

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

TAKEN_ERRNOS = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR})


def canonical_json(value: JsonValue) -> bytes:
    """One text for equal values."""
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def read_published(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> bytes | None:
    """What was published under `path`, None where nothing was.

    Raises:
        OutputError: a folder stands there that nobody has published.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        try:
            return read(path / path.name)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise OutputError(
                f"{path} is a folder without the file {path.name} in it; put that back, or remove the folder and run "
                f"the same command again"
            ) from error


def stage_candidate(files: FilePort, folder: Path, name: str, data: bytes) -> Path:
    """Write what may be published, durably, and alone in a folder of its own. Returns the file."""
    candidate = folder / "publish" / name
    files.make_folder(candidate.parent)
    files.write(candidate, data)
    files.sync(candidate)
    files.sync_folder(candidate.parent)
    return candidate


def publish(files: FilePort, candidate: Path, target: Path, data: bytes, *, has_links: bool) -> bool:
    """Publish a staged candidate.

    Args:
        files: the machine.
        candidate: from stage_candidate, its name equal to the target's.
        target: the final name, in a folder that exists.
        data: the candidate's bytes; they tell ours from another's.
        has_links: False takes the renamed folder.

    Returns:
        True: ours stands there. False: another's does.

    Raises:
        FileNotFoundError: the candidate is gone and nothing stands at the target.
    """
    try:
        if has_links:
            files.link(candidate, target)
        else:
            files.rename(candidate.parent, target)
    except OSError as error:
        # A network filesystem may do the work, lose the answer and refuse the second try: only the target tells.
        standing = read_published(target, files.read)
        if standing is None or (standing != data and error.errno not in TAKEN_ERRNOS | {errno.ENOENT}):
            raise
        if standing != data:
            return False
    files.sync_folder(target.parent)
    return True


def discard(files: FilePort, folder: Path) -> None:
    """Remove a folder of somebody who may still wake up and publish from it.

    First its name goes: without hard links a folder is published, and one that is half removed would be so, empty.
    """
    gone = folder.with_name(f"swept.{files.token()}")
    with contextlib.suppress(FileNotFoundError):
        files.rename(folder, gone)
        remove_tree(files, gone)


def remove_tree(files: FilePort, folder: Path) -> None:
    """Remove a folder and what it holds; others may be removing it too."""
    for name in files.names(folder):
        path = folder / name
        found = files.stat(path)
        if found is None:
            continue
        if found.is_folder:
            remove_tree(files, path)
        else:
            remove_file(files, path)
    try:
        files.remove_folder(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        # Its owner, thought dead, has just written on: the next sweep takes the rest.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def remove_file(files: FilePort, path: Path) -> None:
    """Remove a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        files.remove(path)
