"""The commands as Python functions. Importing this module imports no torch; calling a function does.

Every function takes the command's flags by their names in snake_case and raises geoloc_batch.errors.GeolocError with
the words that the command would print.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoloc_batch.errors import ConfigError
from geoloc_batch.flags import from_flat

if TYPE_CHECKING:
    import pyarrow as pa

    from geoloc_batch.evaluate.evaluation import Evaluation
    from geoloc_batch.locate.head import HeadLocator
    from geoloc_batch.model.encoder import Encoder
    from geoloc_batch.run.config import Summary
    from geoloc_batch.run.dry_run import StreamReport
    from geoloc_batch.run.fidelity import FidelityReport
    from geoloc_batch.store.merge import Merged
    from geoloc_batch.store.status import Status
    from geoloc_batch.store.verification import Verification
    from geoloc_batch.stream.pack import PackSummary
    from geoloc_batch.train.commands import Trained

Paths = str | Path | Sequence[str | Path]


def embed(shards: Paths, *, out: str | Path, **flags: Any) -> Summary:
    """Turn shards of photos into embeddings, in clip-retrieval's layout.

    Args:
        shards: tar files, globs, brace ranges, folders, `pipe:` commands, http(s) addresses.
        out: folder of the results; a run that was cut off goes on where it stopped.
        **flags: any flag of `geoloc embed`: encoder, tap, precision, batch_size, limit, decode_threads, ...

    Returns:
        counts and speed; `exit_code` tells whether the run is complete (0), complete with errors (3) or not (75).

    Raises:
        UserError: a flag, the shards, the checkpoint or the output folder cannot be used.
        HubError: the encoder had to be downloaded and could not be.
    """
    from geoloc_batch.run.config import EmbedConfig
    from geoloc_batch.run.jobs import embed as run_embed

    if flags.get("dry_run"):
        raise ConfigError("embed has no dry_run here; call measure_stream(shards, ...), which needs no out")
    return run_embed(from_flat(EmbedConfig, {"shards": _texts(shards), "out": out, **flags}))


def measure_stream(shards: Paths, **flags: Any) -> StreamReport:
    """Read and decode alone, as `geoloc embed --dry-run`: what these shards could feed on this machine.

    Args:
        shards: as `embed` takes them.
        **flags: any flag of `geoloc embed`: encoder, limit, decode_threads, fast_decode, target_images_per_second, ...

    Returns:
        speed, the limiting stage, busy times and queues; its properties tell what an encoder of
        `target_images_per_second` needs.

    Raises:
        UserError: a flag, the shards or the checkpoint cannot be used.
    """
    from geoloc_batch.run.config import EmbedConfig
    from geoloc_batch.run.dry_run import measure_stream as measure

    return measure(from_flat(EmbedConfig, {"shards": _texts(shards), **flags, "dry_run": True}))


def predict(
    shards: Paths = (),
    *,
    out: str | Path = "",
    from_embeddings: str | Path = "",
    save_embeddings: bool = False,
    **flags: Any,
) -> Summary:
    """Locate photos: those of shards, those whose embeddings were stored, or photos as they are.

    Args:
        shards: as `embed` takes them, or photos and folders of photos; empty with `from_embeddings`.
        out: folder of the results; may be left out for photos.
        from_embeddings: a folder that `embed`, or `predict` with `save_embeddings`, wrote.
        save_embeddings: write the embeddings too, in the same pass.
        **flags: any flag of `geoloc predict`: head, cells, top_k, position, group_by, fusion, combine, encoder, ...

    Returns:
        as `embed`; for photos also their `places`. The rows are in `out/predictions/*.parquet`.

    Raises:
        as `embed`; HeadError, PartitionError: the head does not fit the encoder or the cells.
    """
    from geoloc_batch.run.config import PredictConfig
    from geoloc_batch.run.photos import predict as run_predict

    given = {"out": out, "from_embeddings": from_embeddings, "save_embeddings": save_embeddings}
    return run_predict(from_flat(PredictConfig, {"shards": _texts(shards), **given, **flags}))


def pack(sources: Paths, out: str | Path, **flags: Any) -> PackSummary:
    """Pack photos into tar shards; see geoloc_batch.stream.pack.pack."""
    from geoloc_batch.stream.pack import pack as run_pack

    return run_pack(_texts(sources), out, **flags)


def retry(out: str | Path, **flags: Any) -> Summary:
    """Execute the units of a run that ended with an error once more, where another try could help.

    Args:
        out: the output folder of the run.
        **flags: any flag of `geoloc retry`: unit, encoder, head, cells.

    Returns:
        as `embed`, with counts over all units of `out`.

    Raises:
        as `embed`; OutputError: it is not known how `out` was made.
    """
    from geoloc_batch.run.config import RetryConfig
    from geoloc_batch.run.photos import retry as run_retry

    return run_retry(from_flat(RetryConfig, {"out": str(out), **flags}))


def fidelity(shards: Paths, *, limit: int = 512, **flags: Any) -> FidelityReport:
    """Compare a precision with fp32 on photos of your own, as `geoloc fidelity`.

    Args:
        shards: as `embed` takes them.
        limit: photos to compare, in the order of the shards.
        **flags: any flag of `geoloc fidelity`: encoder, precision, tap, batch_size, head, cells, ...

    Returns:
        cosines and relative errors of the features; for each head how often its best cells agree, and how far its
        posterior mean moves.

    Raises:
        as `predict`; InputError: no photo could be read. GeolocError: the device's memory ended.
    """
    from geoloc_batch.run.config import FidelityConfig
    from geoloc_batch.run.fidelity import measure_fidelity

    return measure_fidelity(from_flat(FidelityConfig, {"shards": _texts(shards), "limit": limit, **flags}))


def evaluate_predictions(
    predictions: str | Path, *, out: str | Path, truth: str | Path = "", **flags: Any
) -> Evaluation:
    """Measure predictions against the truth, as `geoloc evaluate`.

    Args:
        predictions: the folder of a `predict`, or a Parquet or CSV with key, lat, lon.
        out: folder for metrics.json, metrics.md and rows.parquet.
        truth: Parquet or CSV with key, lat, lon; without it the photos' own json says where they were taken.
        **flags: any flag of `geoloc evaluate`: cells, head, thresholds (km), strict, ...

    Returns:
        the metrics by name, counts of what was left out, warnings.

    Raises:
        UserError: a file, a column or a key is not what it must be, or nothing can be compared.
    """
    from geoloc_batch.evaluate.comparison import evaluate
    from geoloc_batch.evaluate.config import EvaluateConfig

    given = {"predictions": str(predictions), "out": str(out), "truth": str(truth)}
    return evaluate(from_flat(EvaluateConfig, {**given, **flags}))


def train_head(embeddings: Paths, *, cells: Paths, out: str | Path, **flags: Any) -> Trained:
    """Train a head on stored embeddings, as `geoloc train`.

    Args:
        embeddings: folders that `embed`, or `predict` with `save_embeddings`, wrote.
        cells: the cells that the head chooses among; several with `sweep`.
        out: folder of the head; a training that was cut off goes on where it stopped.
        **flags: any flag of `geoloc train`: group_by, fusion, loss, lam, epochs, lr, seed, sweep, split_file, ...

    Returns:
        the head.json of each head, the best on val first; `exit_code` tells whether all are done (0) or not (75).

    Raises:
        UserError: the embeddings, the cells, a flag or the output folder cannot be used.
    """
    from geoloc_batch.train.commands import train as run_train
    from geoloc_batch.train.config import TrainConfig

    given = {"embeddings": _texts(embeddings), "cells": _texts(cells), "out": str(out)}
    return run_train(from_flat(TrainConfig, {**given, **flags}))


def read_tables(folder: str | Path) -> pa.Table:
    """All tables of OUT/predictions, OUT/metadata or OUT/errors as one; see geoloc_batch.store.tables.read_tables."""
    from geoloc_batch.store.tables import read_tables as read

    return read(folder)


def verify(out: str | Path) -> Verification:
    """Prove from the files of a run that every photo gave one row or one error row."""
    from geoloc_batch.store.verify import verify as run_verify

    return run_verify(out)


def status(out: str | Path) -> Status:
    """How far the run in `out` is, how fast, what it waits for, who works on it and who has gone silent."""
    from geoloc_batch.store.status import status as read_status

    return read_status(out)


def merge(run: str | Path, *, out: str | Path, embeddings: bool = False, partial: bool = False) -> Merged:
    """Put the tables of all units of a run together, as `geoloc merge`. Needs no memory for it, unlike read_tables.

    Args:
        run: the output folder of the run.
        out: FILE.parquet, or a new folder laid out as `run` is.
        embeddings: merge these into one .npy, with their metadata as one Parquet; otherwise the predictions are merged,
            or, where there are none, the metadata.
        partial: take what is done of a run that is not complete.

    Returns:
        counts of units, rows, files and bytes.

    Raises:
        OutputError: `run` is not complete or damaged, or `out` is there already.
    """
    from geoloc_batch.store.config import MergeConfig
    from geoloc_batch.store.merge import merge as run_merge

    return run_merge(MergeConfig(run=str(run), out=str(out), embeddings=embeddings, partial=partial))


def load_encoder(encoder: str = "", **flags: Any) -> Encoder:
    """Load an encoder; see geoloc_batch.model.encoder.load_encoder. Nothing named takes StreetCLIP."""
    from geoloc_batch.model.encoder import load_encoder as load

    return load(encoder, **flags) if encoder else load(**flags)


def load_head(path: str | Path, cells: str | Path | None = None, **flags: Any) -> HeadLocator:
    """Load a head, a published one by its short name, and its cells; see geoloc_batch.locate.head.load_head."""
    from geoloc_batch.locate.head import load_head as load

    return load(path, cells, **flags)


def _texts(paths: Paths) -> tuple[str, ...]:
    return (str(paths),) if isinstance(paths, str | Path) else tuple(str(path) for path in paths)
