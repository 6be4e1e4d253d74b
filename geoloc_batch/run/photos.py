"""`geoloc predict holiday.jpg`: photos packed on the fly, and what comes of them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_WITH_ERRORS, ConfigError, InputError, OutputError
from geoloc_batch.locate.requests import find_requests
from geoloc_batch.run import jobs
from geoloc_batch.run.config import PhotoPlace, PredictConfig, RetryConfig, Summary
from geoloc_batch.run.photo_places import format_table, read_errors, read_places
from geoloc_batch.store.locations import location_name
from geoloc_batch.store.metadata import flatten
from geoloc_batch.store.pin import PACKED, refuse_foreign
from geoloc_batch.stream.pack import pack
from geoloc_batch.stream.packing.meta import IMAGE_EXTENSIONS
from geoloc_batch.stream.shards import SHARD_ENDINGS

__all__ = ["format_table", "predict", "retry"]

MAX_SHOWN = 50
_SMALL_BATCH = 32
_LISTING = "listing.json"


def predict(config: PredictConfig) -> Summary:
    """Locate photos, or the photos of shards, whichever the inputs are; see geoloc_batch.run.jobs.predict."""
    photos = _photo_inputs(config.shards)
    return _predict_photos(config, photos) if photos else jobs.predict(config)


def retry(config: RetryConfig) -> Summary:
    """Retry a run, see geoloc_batch.run.jobs.retry; photos that could not be packed on the fly count as they did."""
    return _with_skipped(jobs.retry(config), _skipped(Path(config.out) / PACKED))


def _photo_inputs(inputs: Sequence[str]) -> list[str]:
    """The photos and folders of photos that are meant, globs expanded; empty where shards are meant.

    Raises:
        InputError: both kinds stand among them, one is empty or absent, or a glob of photos matches none.
    """
    photos: list[str] = []
    others: list[str] = []
    for text in inputs:
        if not text.strip():
            raise InputError("a name among the inputs is empty; give photos, folders of photos, or tar shards")
        is_glob = not os.path.exists(text) and glob.has_magic(text) and ":" not in text
        found = sorted(glob.glob(text, recursive=True)) if is_glob else [text]
        for name in found or [text]:
            (photos if _is_photo_input(name) else others).append(name)
        if photos and not os.path.exists(photos[-1]):
            fault = "does not exist; check the path" if found else "matches no photo; check the pattern and the folder"
            raise InputError(f"{photos[-1]} {fault}")
    if photos and others:
        raise InputError(
            f"{photos[0]} is a photo or a folder of photos, {others[0]} is not; give one kind per run: one command for "
            f"the photos, one for the shards"
        )
    return photos


def _is_photo_input(text: str) -> bool:
    if text.startswith("pipe:") or "://" in text:
        return False
    path = Path(text)
    if not path.is_dir():
        return _is_photo_name(path.name)
    names = [entry.name for entry in path.iterdir()]
    shard = next((name for name in names if name.lower().endswith(SHARD_ENDINGS)), None)
    photo = next((name for name in names if _is_photo_name(name)), None)
    if shard and photo:
        raise InputError(
            f"{text} holds shards ({shard}) and photos ({photo}); name the shards as {text}/*.tar or the photos"
        )
    return shard is None


def _is_photo_name(name: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def _predict_photos(config: PredictConfig, photos: Sequence[str]) -> Summary:
    """Pack, predict, and give the places of the first MAX_SHOWN photos. Without `out` nothing is kept."""
    # Before photos are packed: a head that is misspelt is told at once.
    find_requests(config.locate)
    with _folder(config.out) as out:
        is_packed = (out / PACKED).exists()
        num_packed = _pack_once(photos, out)
        if config.group_by:
            _check_locations(out, config.group_by, is_packed=is_packed)
        skipped = _skipped(out / PACKED)
        encoder = config.encoder
        if encoder.given_batch_size is None:
            # A batch is always padded to its full size: one photo shall not cost what 32 do.
            encoder = dataclasses.replace(encoder, batch_size=min(_SMALL_BATCH, max(1, num_packed)))
        located = dataclasses.replace(config, shards=(str(out / PACKED),), out=str(out), encoder=encoder)
        summary = jobs.predict(located, inputs=[str(Path(text).absolute()) for text in photos])
        told = itertools.chain(read_errors(out), read_places(out, MAX_SHOWN), ([place] for place in skipped))
        places = itertools.chain.from_iterable(itertools.islice(told, MAX_SHOWN))
        return dataclasses.replace(_with_skipped(summary, skipped), out=config.out, places=tuple(places))


def _with_skipped(summary: Summary, skipped: Sequence[PhotoPlace]) -> Summary:
    """A summary that counts the photos that never came into a shard."""
    return dataclasses.replace(
        summary,
        samples=summary.samples + len(skipped),
        errors=summary.errors + len(skipped),
        exit_code=summary.exit_code or (EXIT_WITH_ERRORS if skipped else EXIT_COMPLETE),
    )


def _pack_once(photos: Sequence[str], out: Path) -> int:
    """Pack into OUT's own folder, or find the same photos packed there before; how many they are.

    Raises:
        OutputError: OUT is somebody else's, or the photos have changed since they were packed.
    """
    listing = _listing(photos)
    shards = out / PACKED
    try:
        before = json.loads((shards / _LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before is None:
        if out.is_dir():
            refuse_foreign(out, (path.name for path in out.iterdir()))
        # What a killed packing left has no listing, which is written last.
        shutil.rmtree(shards, ignore_errors=True)
        packed = pack(photos, shards, duplicates="rename", skip_missing=True)
        before = {"photos": packed.photos, "listing": listing}
        scratch = shards / f"{_LISTING}.part"
        scratch.write_text(json.dumps(before) + "\n", encoding="utf-8")
        scratch.rename(shards / _LISTING)
    elif before["listing"] != listing:
        raise OutputError(
            f"--out {out} was made from these inputs when they held other photos; give another --out, "
            "or the inputs as they were"
        )
    return int(before["photos"])


def _check_locations(out: Path, field: str, *, is_packed: bool) -> None:
    """Raise ConfigError where no packed photo's json names a location; what was packed for this run goes."""
    members: dict[str, None] = {}
    for shard in sorted((out / PACKED).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    flat = flatten(file.read()) or {}
                    if location_name(flat.get(field)) is not None:
                        return
                    members.update(dict.fromkeys(flat))
    if not is_packed:
        shutil.rmtree(out / PACKED)
        with contextlib.suppress(OSError):
            out.rmdir()
    raise ConfigError(
        f"--group-by {field}: none of the photos has a json beside it (photo.json beside photo.jpg) that has {field!r} "
        f"and so names its location; what is known of them is {', '.join(list(members)[:30])}. Name one of these, or "
        f"pack the photos from a table with that column (geoloc pack TABLE --out SHARDS), then predict the shards"
    )


def _listing(photos: Sequence[str]) -> str:
    """A hash of which files the inputs hold, by name, size and time."""
    told = hashlib.sha256()
    for text in photos:
        path = Path(text)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                found = file.stat()
                told.update(
                    f"{file.absolute()}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
    return told.hexdigest()


def _skipped(shards: Path) -> list[PhotoPlace]:
    """Photos that could not even be packed."""
    if not (shards / "skipped.csv").exists():
        return []
    with open(shards / "skipped.csv", encoding="utf-8", newline="") as file:
        return [PhotoPlace(photo=row["where"], error=f"read: {row['reason']}") for row in csv.DictReader(file)]


@contextmanager
def _folder(out: str) -> Iterator[Path]:
    if out:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="geoloc-") as folder:
        yield Path(folder) / "out"
