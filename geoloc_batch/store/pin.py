"""The start of a run on an OUT: is the folder usable and ours, and is this the config that it was pinned to?"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import NO_LINK_ERRNOS, FilePort
from geoloc_batch.store.publish import (
    JsonValue,
    canonical_json,
    publish,
    read_published,
    remove_tree,
    stage_candidate,
)

RUN_FILE = "run.json"
LAYOUT = 1
OWN_FOLDERS = ("_staging", "_leases", "_done", "_logs")
SUMS = "_sums"
"""Made by the first rank that has something to add up."""
PACKED = "_shards"
"""Folder below OUT for photos that were packed on the fly; made before the ledger is opened."""
# What filesystems and file servers put into folders by themselves.
FOREIGN_BUT_HARMLESS = re.compile(r"lost\+found|\.DS_Store|\.nfs.*|\.snapshot|\.fuse_hidden.*")
OBJECT_STORE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
LATER_KEYS = frozenset({"decode", "apply_orientation", "max_pixels", "compile_mode", "sdpa"})
"""What every run of photos pins, but the first versions did not."""
MIN_FREE_BYTES = 8 << 20
PIN_TRIES = 10
MAX_SHOWN = 80


def config_hash(config: Mapping[str, JsonValue]) -> str:
    """Short hash of a config; equal configs have equal ones, whatever the order of the keys."""
    return hashlib.sha256(canonical_json(dict(config))).hexdigest()[:16]


def refuse_object_store(out: Path | str) -> None:
    """Raise OutputError for an URL: object stores have neither exclusive creation nor renames."""
    if OBJECT_STORE.match(str(out)):
        # A Path has swallowed one of the slashes.
        given = OBJECT_STORE.sub(r"\1://", str(out), count=1)
        raise OutputError(
            f"--out {given} is a URL: an object store has no exclusive creation and no rename, so nothing there can be "
            f"written exactly once; write to a local or shared folder and copy that when it is complete"
        )


def prepare_folder(files: FilePort, out: Path) -> bool:
    """Make OUT and the ledger's own folders, and probe it.

    Returns:
        Whether it has hard links.

    Raises:
        OutputError: it is no folder, holds something else, cannot be written, or is full.
    """
    refuse_object_store(out)
    try:
        found = files.stat(out)
        if found is not None and not found.is_folder:
            raise OutputError(f"--out {out} is a file; give a folder")
        missing = [folder for folder in out.parents if files.stat(folder) is None]
        files.make_folder(out)
        # A name of OUT that a power cut takes back would take every result with it.
        for made in [out, *missing]:
            with contextlib.suppress(OSError):
                files.sync_folder(made.parent)
        # First the names, then run.json: a rank that starts beside us makes that before anything of its results.
        names = files.names(out)
        if files.stat(out / RUN_FILE) is None:
            refuse_foreign(out, names)
        for name in OWN_FOLDERS:
            files.make_folder(out / name)
        for _ in range(PIN_TRIES - 1):
            # Swept by a rank that saw us stopped for long: once more.
            with contextlib.suppress(FileNotFoundError):
                return _probe(files, out)
        return _probe(files, out)
    except OSError as error:
        raise OutputError(f"--out {out} cannot be used: {error.strerror or error}; {_remedy(error)}") from error


def refuse_foreign(out: Path, names: Iterable[str]) -> None:
    """Raise OutputError where a folder without run.json holds `names` that are none of ours."""
    ours = {*OWN_FOLDERS, SUMS, PACKED, RUN_FILE}
    foreign = [name for name in names if name not in ours and not FOREIGN_BUT_HARMLESS.fullmatch(name)]
    if foreign:
        raise OutputError(f"--out {out} holds {foreign[0]!r} and was not made by geoloc; give a new or an empty folder")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or give another --out"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable for this user, or give another --out"
    return "give another --out"


def _probe(files: FilePort, out: Path) -> bool:
    free = files.free_bytes(out)
    if free < MIN_FREE_BYTES:
        raise OutputError(f"--out {out} has {free} bytes left; free some space, or give another --out")
    scratch = out / "_staging" / f"probe.{files.token()}"
    try:
        stage_candidate(files, scratch / "a", "file", b"probe\n")
        try:
            files.link(scratch / "a" / "publish" / "file", scratch / "linked")
            return True
        except FileExistsError:
            # The name is new: it was made, and a network filesystem lost the answer to the first try.
            return True
        except OSError as error:
            if error.errno not in NO_LINK_ERRNOS:
                raise
        stage_candidate(files, scratch / "b", "file", b"probe\n")
        files.rename(scratch / "a" / "publish", scratch / "target")
        try:
            files.rename(scratch / "b" / "publish", scratch / "target")
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        raise OutputError(
            f"--out {out} has no hard links and lets one folder be renamed over another, so two ranks could publish "
            f"the same unit; give a folder on another filesystem"
        )
    finally:
        remove_tree(files, scratch)


def pin_config(
    files: FilePort, out: Path, pinned: Mapping[str, JsonValue], adoptable: Collection[str], *, has_links: bool
) -> dict[str, JsonValue]:
    """Pin the config of OUT as the first, or compare with what is pinned.

    Returns:
        The config that holds: the pinned values of the keys in `adoptable`, the given ones of all others.

    Raises:
        OutputError: OUT is pinned to another config; every key that differs is named.
    """
    given = cast("dict[str, JsonValue]", json.loads(json.dumps(dict(pinned))))
    data = canonical_json({"layout": LAYOUT, "config": given})
    target = out / RUN_FILE
    for _ in range(PIN_TRIES):
        standing = read_published(target, files.read)
        if standing is not None:
            return _compare(out, given, parse_run(target, standing), adoptable)
        scratch = out / "_staging" / f"pin.{files.token()}"
        try:
            candidate = stage_candidate(files, scratch, RUN_FILE, data)
            publish(files, candidate, target, data, has_links=has_links)
        except FileNotFoundError:
            # Swept by a rank that saw us stopped for long: once more.
            continue
        finally:
            remove_tree(files, scratch)
    raise OutputError(f"{target} could not be written in {PIN_TRIES} tries; is something cleaning {out}?")


def parse_run(path: Path, data: bytes) -> dict[str, JsonValue]:
    """The config in run.json.

    Raises:
        OutputError: it is not ours, or of another version.
    """
    try:
        run = json.loads(data)
        layout, config = run["layout"], run["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(f"{path} was not written by geoloc; give another --out") from error
    if layout != LAYOUT or not isinstance(config, dict):
        raise OutputError(f"{path} has layout {layout}, this version writes {LAYOUT}; give another --out")
    return cast("dict[str, JsonValue]", config)


def read_config(out: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> dict[str, JsonValue]:
    """The config that an existing OUT is pinned to; OutputError where it is none of ours."""
    data = read_published(out / RUN_FILE, read) if out.is_dir() else None
    if data is None:
        raise OutputError(f"{out} is not an output folder of geoloc: it has no {RUN_FILE}")
    return parse_run(out / RUN_FILE, data)


def _compare(
    out: Path, given: dict[str, JsonValue], pinned: dict[str, JsonValue], adoptable: Collection[str]
) -> dict[str, JsonValue]:
    missing = sorted(given.keys() - pinned.keys())
    # Where more is missing, it was another kind of run.
    if missing and LATER_KEYS.issuperset(missing):
        raise OutputError(
            f"--out {out} was begun by an earlier version of geoloc, which did not pin {', '.join(missing)}: whether "
            f"this one would make the same rows cannot be told. Give another --out, or go on with that version"
        )
    differing = []
    for key in sorted(given.keys() | pinned.keys()):
        if key not in pinned or key not in given:
            side = "is not pinned" if key not in pinned else "is not given"
            differing.append(f"{key} {side} (the other side has {_shown(given.get(key, pinned.get(key)))})")
        elif key not in adoptable:
            differing += differences(pinned[key], given[key], name=key)
    if differing:
        raise OutputError(
            f"--out {out} belongs to a run with another config: {'; '.join(differing)}. "
            f"Give the same flags as before, or another --out"
        )
    return pinned


def differences(pinned: JsonValue, given: JsonValue, name: str = "") -> Iterator[str]:
    """What differs between two values of JSON, down to the innermost values, each in words.

    Args:
        pinned: the earlier one.
        given: the later one.
        name: what they are called; "" where their members' names say enough.
    """
    if pinned == given:
        return
    if isinstance(pinned, dict) and isinstance(given, dict):
        for key in sorted(pinned.keys() | given.keys()):
            dotted = f"{name}.{key}" if name else key
            if key in pinned and key in given:
                yield from differences(pinned[key], given[key], dotted)
            elif key in pinned:
                yield f"{dotted} is pinned to {_shown(pinned[key])}, now it is not given"
            else:
                yield f"{dotted} is not pinned, now {_shown(given[key])}"
    elif isinstance(pinned, list) and isinstance(given, list):
        if len(pinned) != len(given):
            yield f"{name} is pinned to {len(pinned)} entries, now {len(given)}"
        for number, (old, new) in enumerate(zip(pinned, given, strict=False)):
            yield from differences(old, new, f"{name}[{number}]")
    else:
        texts = json.dumps(pinned), json.dumps(given)
        # Long texts that begin alike are shown from shortly before they part.
        alike = next((i for i, (old, new) in enumerate(zip(*texts, strict=False)) if old != new), 0)
        start = max(0, alike - 20) if max(map(len, texts)) > MAX_SHOWN else 0
        yield f"{name} is pinned to {_cut(texts[0], start)}, now {_cut(texts[1], start)}"


def _shown(value: JsonValue) -> str:
    return _cut(json.dumps(value))


def _cut(text: str, start: int = 0) -> str:
    text = "..." + text[start:] if start else text
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
