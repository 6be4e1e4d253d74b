"""The folder of a training: which settings it is pinned to, how far it is; files are there whole or not at all.

train.json comes first and pins the settings; _checkpoint.pt is replaced after every epoch; head.json comes last and
says that the head is done. A process that is killed leaves nothing that the next one could not go on from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from geoloc_batch.errors import GeolocError, OutputError
from geoloc_batch.store.pin import FOREIGN_BUT_HARMLESS, differences, refuse_object_store
from geoloc_batch.train.fit import State
from geoloc_batch.whole_file import in_one_move

SETTINGS, CHECKPOINT, HEAD = "train.json", "_checkpoint.pt", "head.json"
PART = "_part"
LAYOUT = 1

KIND = "geoloc training"


def write_whole(path: Path, make: Callable[[Path], None]) -> None:
    """Write a file so that it is there whole, and on the disk, or not at all.

    Args:
        path: where it goes; its folder must exist. What stands there stays until the new one is whole.
        make: writes it to another path of the same name.

    Raises:
        GeolocError: the disk is full, or will not take it for another reason.
    """
    part = path.parent / PART / path.name
    try:
        part.parent.mkdir(exist_ok=True)
        in_one_move(path, make, part=part)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room on its disk" if is_full else "mend that"
        raise GeolocError(
            f"{path} cannot be written: {error.strerror or error}; {remedy}, then run the same command again: training "
            "goes on where it was"
        ) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON in one move; NaN becomes null."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: _write_text(part, text))


def read_json(path: Path, kind: str = KIND) -> dict[str, Any] | None:
    """A file of ours; None where there is none.

    Raises:
        OutputError: it is another program's, or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path} was not written by geoloc ({error}); give another --out") from error
    if not isinstance(values, dict) or (values.get("made_by"), values.get("layout")) != (kind, LAYOUT):
        raise OutputError(f"{path} was not written by this version of geoloc; give another --out")
    return values


def check_folder(folder: Path, *, marks: tuple[str, ...] = (SETTINGS,)) -> None:
    """Refuse a folder that is no training's, before the work.

    Args:
        folder: absent, empty, or with one of `marks` in it.
        marks: files that make it ours.

    Raises:
        OutputError: it is a file, a URL, or holds something else.
    """
    refuse_object_store(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is a file; name a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(name in marks for name in names):
        return
    strange = [name for name in names if name != PART and not FOREIGN_BUT_HARMLESS.fullmatch(name)]
    if strange:
        raise OutputError(
            f"--out {folder} holds {strange[0]!r} and was not made by this command; give a new or an empty folder"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made where it is not there. A lock dies with its process.

    Raises:
        OutputError: another process trains in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"--out {folder} cannot be used: {error.strerror or error}; give another --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Filesystems without locks go without.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise OutputError(
                f"another process trains in --out {folder}; wait for it, or give another --out"
            ) from error
    try:
        yield
    finally:
        shutil.rmtree(folder / PART, ignore_errors=True)
        os.close(descriptor)


def pin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Pin the settings of a folder as the first, or compare with what is pinned; errors as in `check_settings`."""
    if read_json(folder / SETTINGS) is None:
        write_json(folder / SETTINGS, {**mark(KIND), **settings})
    check_settings(folder, settings)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Compare settings with those that a folder is pinned to; one that is pinned to none takes any.

    Raises:
        OutputError: others are pinned; each that differs is named.
    """
    pinned = read_json(folder / SETTINGS)
    given = json.loads(json.dumps({**mark(KIND), **settings}))
    differing = [] if pinned is None else list(differences(pinned, given))
    if differing:
        raise OutputError(
            f"--out {folder} belongs to a training with other settings: {'; '.join(differing)}. Give the same flags "
            "and inputs as before, or another --out"
        )


def mark(kind: str) -> dict[str, Any]:
    """What tells a file of ours."""
    return {"made_by": kind, "layout": LAYOUT}


def save_checkpoint(folder: Path, state: State) -> None:
    """Keep the state of a training, in one move and on the disk.

    Raises:
        GeolocError: it cannot be written; the earlier one stays.
    """
    values = {
        "layout": LAYOUT,
        "epoch": state.epoch,
        "head": state.head,
        "optimizer": state.optimizer,
        "best": state.best,
        "best_epoch": state.best_epoch,
        "best_rank": list(state.best_rank),
        "position": state.position,
        "least_km": state.least_km,
        "better_epoch": state.better_epoch,
        "history": state.history,
        "features_sha256": state.features_sha256,
    }
    # By way of memory: of a full disk torch's own writer says nothing but that it failed.
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_whole(folder / CHECKPOINT, lambda part: _write_bytes(part, buffer))


def load_checkpoint(folder: Path) -> State | None:
    """The state that a training was left in; None before its first epoch ended.

    Raises:
        OutputError: the file is damaged, which no cut-off training does.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values.pop("layout") != LAYOUT:
            raise ValueError("another version wrote it")
        features_sha256 = str(values["features_sha256"])
        return State(**{**values, "best_rank": tuple(values["best_rank"]), "features_sha256": features_sha256})
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise OutputError(
            f"{path} cannot be read ({type(error).__name__}); remove it: training then begins anew"
        ) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_bytes(path: Path, buffer: io.BytesIO) -> None:
    path.write_bytes(buffer.getbuffer())
