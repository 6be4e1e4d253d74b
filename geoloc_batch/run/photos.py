"""`geoloc predict holiday.jpg`: photos packed on the fly, their places read back for a table."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_WITH_ERRORS, ConfigError, InputError, OutputError
from geoloc_batch.locate.requests import find_requests
from geoloc_batch.run import jobs
from geoloc_batch.run.config import PhotoPlace, PredictConfig, RetryConfig, Summary
from geoloc_batch.store.pin import PACKED, refuse_foreign
from geoloc_batch.stream.pack import pack
from geoloc_batch.stream.packing.meta import IMAGE_EXTENSIONS
from geoloc_batch.stream.shards import SHARD_ENDINGS

MAX_SHOWN = 50
_SMALL_BATCH = 32
_LISTING = "listing.json"


def predict(config: PredictConfig) -> Summary:
    """Locate photos, or the photos of shards, whichever the inputs are; see geoloc_batch.run.jobs.predict."""
    photos = _photo_inputs(config.shards)
    if photos and config.group_by:
        raise ConfigError(
            f"--group-by {config.group_by}: photos that are given as files have no json that names their location; "
            f"pack them from a table with that column (geoloc pack TABLE --out SHARDS), then predict the shards"
        )
    return _predict_photos(config, photos) if photos else jobs.predict(config)


def retry(config: RetryConfig) -> Summary:
    """Retry a run, see geoloc_batch.run.jobs.retry; photos that could not be packed on the fly count as they did."""
    return _with_skipped(jobs.retry(config), _skipped(Path(config.out) / PACKED))


def format_table(summary: Summary) -> str:
    """The places of a summary as lines for a terminal, and how many photos are not among them."""
    places = summary.places
    if not places:
        return "no photo was located"
    width = max(len("photo"), *(len(place.photo) for place in places))
    lines = [f"{'photo':<{width}}  {'lat':>9}  {'lon':>10}  {'sure':>6}  {'spread':>8}  cell"]
    for place in places:
        if place.error:
            lines.append(f"{place.photo:<{width}}  {place.error}")
        else:
            lines.append(
                f"{place.photo:<{width}}  {place.lat:9.4f}  {place.lon:10.4f}  {place.prob:6.1%}  "
                f"{place.spread_km:5.0f} km  {place.cell}  {place.head}".rstrip()
            )
    # Not by their names: a photo may have been given twice.
    per_head = Counter(place.head for place in places if not place.error)
    more = summary.samples - sum(bool(place.error) for place in places) - max(per_head.values(), default=0)
    if more > 0:
        remedy = "all of them are in the predictions of --out" if summary.out else "pass --out to keep all of them"
        lines.append(f"... and {more} more; {remedy}")
    return "\n".join(lines)


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
        num_packed = _pack_once(photos, out)
        skipped = _skipped(out / PACKED)
        encoder = config.encoder
        if encoder.given_batch_size is None:
            # A batch is always padded to its full size: one photo shall not cost what 32 do.
            encoder = dataclasses.replace(encoder, batch_size=min(_SMALL_BATCH, max(1, num_packed)))
        located = dataclasses.replace(config, shards=(str(out / PACKED),), out=str(out), encoder=encoder)
        summary = jobs.predict(located, inputs=[str(Path(text).absolute()) for text in photos])
        told = itertools.chain(_read_errors(out), _read_places(out, MAX_SHOWN), ([place] for place in skipped))
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


def _read_errors(out: Path) -> Iterator[list[PhotoPlace]]:
    for path in sorted(out.glob("errors/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            yield [PhotoPlace(photo=row["key"], error=f"{row['stage']}: {row['message']}")]


def _read_places(out: Path, max_photos: int) -> Iterator[list[PhotoPlace]]:
    """The first photos, each with what every head says of it."""
    trees: dict[Path, list[Path]] = {}
    for path in sorted(out.glob("**/predictions/*.parquet")):
        trees.setdefault(path.parents[1].relative_to(out), []).append(path)
    photos: dict[tuple[str, int], list[PhotoPlace]] = {}
    for tree, paths in trees.items():
        for row in _first_rows(paths, max_photos):
            place = PhotoPlace(
                photo=str(row.get("meta_path") or row["key"]),
                head="" if tree == Path() else tree.as_posix(),
                lat=row["lat"],
                lon=row["lon"],
                cell=row["cell"],
                prob=row["prob"],
                spread_km=row["spread_km"],
            )
            photos.setdefault((row["shard"], row["row"]), []).append(place)
    yield from photos.values()


def _first_rows(paths: Sequence[Path], max_rows: int) -> Iterator[dict[str, Any]]:
    for path in paths:
        rows = pq.read_table(path).slice(0, max_rows).to_pylist()
        yield from rows
        max_rows -= len(rows)
        if not max_rows:
            return
