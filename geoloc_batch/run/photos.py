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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_WITH_ERRORS, InputError, OutputError
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
    more = summary.samples - len({place.photo for place in places})
    if more > 0:
        lines.append(f"... and {more} more; all of them are in the predictions of --out")
    return "\n".join(lines)


def _photo_inputs(inputs: Sequence[str]) -> list[str]:
    """The photos and folders of photos that are meant, globs expanded; empty where shards are meant.

    Raises:
        InputError: both kinds stand among them.
    """
    found: list[str] = []
    for text in inputs:
        is_glob = not os.path.exists(text) and glob.has_magic(text) and ":" not in text
        names = sorted(glob.glob(text, recursive=True)) if is_glob else [text]
        photos = [name for name in names if _is_photo_input(name)]
        if photos and len(photos) < len(names):
            raise InputError(f"{text} matches photos and other files; give one kind per run")
        found += photos
        if bool(photos) != bool(found):
            raise InputError(f"photos and shards stand together in {' '.join(inputs)}; give one kind per run")
    return found


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
    """Pack, predict, and give the first MAX_SHOWN places. Without `out` nothing is kept."""
    with _folder(config.out) as out:
        num_packed = _pack_once(photos, out)
        skipped = _skipped(out / PACKED)
        encoder = config.encoder
        if encoder.given_batch_size is None:
            # A batch is always padded to its full size: one photo shall not cost what 32 do.
            encoder = dataclasses.replace(encoder, batch_size=min(_SMALL_BATCH, max(1, num_packed)))
        located = dataclasses.replace(config, shards=(str(out / PACKED),), out=str(out), encoder=encoder)
        summary = jobs.predict(located, inputs=[str(Path(text).absolute()) for text in photos])
        places = itertools.islice(itertools.chain(_read_places(out), skipped), MAX_SHOWN)
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


def _read_places(out: Path) -> Iterator[PhotoPlace]:
    for path in sorted(out.glob("errors/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            yield PhotoPlace(photo=row["key"], error=f"{row['stage']}: {row['message']}")
    for path in sorted(out.glob("**/predictions/*.parquet")):
        head = path.parents[1].relative_to(out).as_posix()
        for row in pq.read_table(path).to_pylist():
            yield PhotoPlace(
                photo=str(row.get("meta_path") or row["key"]),
                head="" if head == "." else head,
                lat=row["lat"],
                lon=row["lon"],
                cell=row["cell"],
                prob=row["prob"],
                spread_km=row["spread_km"],
            )
