"""`geoloc predict holiday.jpg`: photos packed on the fly, their places read back for a table."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from geoloc_batch.errors import InputError
from geoloc_batch.run.config import PredictConfig, Summary
from geoloc_batch.run.jobs import predict
from geoloc_batch.store.pin import PACKED, refuse_foreign
from geoloc_batch.stream.pack import pack
from geoloc_batch.stream.packing.meta import IMAGE_EXTENSIONS

MAX_SHOWN = 50
_SMALL_BATCH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoPlace:
    """One line of the table: where a photo was taken, or why that cannot be said."""

    photo: str
    head: str = ""
    lat: float = float("nan")
    lon: float = float("nan")
    cell: int = -1
    prob: float = float("nan")
    spread_km: float = float("nan")
    error: str = ""


def are_photos(inputs: Sequence[str]) -> bool:
    """Whether the inputs are photos or folders of photos, rather than shards.

    Raises:
        InputError: both kinds stand among them.
    """
    kinds = {_is_photo_input(Path(text)) for text in inputs}
    if len(kinds) > 1:
        raise InputError(f"photos and shards stand together in {' '.join(inputs)}; give one kind per run")
    return kinds == {True}


def predict_photos(config: PredictConfig) -> tuple[Summary, list[PhotoPlace]]:
    """Locate photos, and give the first MAX_SHOWN places. Without `--out` nothing is kept."""
    with _folder(config.out) as out:
        shards, encoder = out / PACKED, config.encoder
        if not shards.exists():
            if out.is_dir():
                refuse_foreign(out, (path.name for path in out.iterdir()))
            packed = pack(config.shards, shards, duplicates="rename")
            if not encoder.batch_size:
                # A batch is always padded to its full size: one photo shall not cost what 32 do.
                encoder = dataclasses.replace(encoder, batch_size=min(_SMALL_BATCH, packed.photos))
        located = dataclasses.replace(config, shards=(str(shards),), out=str(out), encoder=encoder)
        summary = predict(located, inputs=[str(Path(text).absolute()) for text in config.shards])
        places = list(itertools.islice(_read_places(out), MAX_SHOWN))
        return dataclasses.replace(summary, out=config.out), places


def format_table(places: Sequence[PhotoPlace], num_photos: int) -> str:
    """The places as lines for a terminal, and how many of `num_photos` are not among them."""
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
    more = num_photos - len({place.photo for place in places})
    if more > 0:
        lines.append(f"... and {more} more; all of them are in the predictions of --out")
    return "\n".join(lines)


def _is_photo_input(path: Path) -> bool:
    if path.is_dir():
        names = [entry.name.lower() for entry in path.iterdir()]
        return not any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names)
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


@contextmanager
def _folder(out: str) -> Iterator[Path]:
    if out:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="geoloc-") as folder:
        yield Path(folder) / "out"


def _read_places(out: Path) -> Iterator[PhotoPlace]:
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
    for path in sorted(out.glob("errors/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            yield PhotoPlace(photo=row["key"], error=f"{row['stage']}: {row['message']}")
