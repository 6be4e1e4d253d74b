"""Where predictions and truth stand: a file, a folder of Parquet, or OUT of a run with one head or several."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.errors import ConfigError, InputError
from geoloc_batch.evaluate.progress import Progress, is_run, progress_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The files of one table."""

    name: str
    """What messages call it."""
    files: tuple[Path, ...]
    errors: tuple[Path, ...] = ()
    """Tables of the run's error rows: photos that were asked for and have no prediction."""
    progress: Progress | None = None
    """How far the run was before its files were listed, so that it counts nothing as done that is not among them."""


def find_predictions(given: str, head: str) -> Source:
    """The files behind PREDICTIONS.

    Args:
        given: a Parquet or CSV, a folder of Parquet, or OUT of a run.
        head: the folder of one of several heads, "" where there is one.

    Raises:
        InputError: there is nothing, or no predictions.
        ConfigError: `head` is missing, or none of those that are there.
    """
    path = Path(given)
    if not path.is_dir():
        if head:
            raise ConfigError(f"--head {head} chooses among the heads of a run, and {given} is a file; leave it out")
        return _file(path, "predictions: name OUT of `geoloc predict`, a Parquet or a CSV")
    run = _run_above(path)
    progress = progress_of(run) if run else None
    own = _parquets(path / "predictions")
    of_head = {folder.name: files for folder in sorted(path.iterdir()) if (files := _parquets(folder / "predictions"))}
    if run == path and not own and not of_head:
        raise InputError(_none_yet(given, path))
    if head:
        if head not in of_head:
            raise ConfigError(_no_such_head(given, head, list(of_head)))
        files = of_head[head]
        return Source(name=f"{given}, head {head}", files=files, errors=_parquets(path / "errors"), progress=progress)
    if own:
        return Source(name=given, files=own, errors=_parquets(path / "errors"), progress=progress)
    if len(of_head) > 1:
        raise ConfigError(f"{given} holds the predictions of {len(of_head)} heads; choose one: {_choices(of_head)}")
    for name, files in of_head.items():
        return Source(name=f"{given}, head {name}", files=files, errors=_parquets(path / "errors"), progress=progress)
    if files := _parquets(path):
        return Source(name=given, files=files, errors=_parquets(run / "errors") if run else (), progress=progress)
    if run or (path / "img_emb").is_dir():
        raise InputError(_none_yet(given, path))
    raise InputError(f"{given} holds no predictions/*.parquet; name OUT of a finished `geoloc predict`")


def find_truth(given: str) -> Source:
    """The files behind --truth: a Parquet or CSV, or a folder of Parquet.

    Raises:
        InputError: there is none.
    """
    path = Path(given)
    if path.is_dir():
        if is_run(path):
            folders = [folder for folder in (path, *sorted(path.iterdir())) if _parquets(folder / "predictions")]
            if not folders:
                raise InputError(f"--truth {_none_yet(given, path)}")
            choices = " or ".join(str(folder / "predictions") for folder in folders)
            raise InputError(f"--truth {given} is OUT of a run; give its predictions: {choices}")
        if files := _parquets(path):
            return Source(name=given, files=files)
        raise InputError(f"--truth {given} is a folder without .parquet; name a Parquet or CSV with key, lat, lon")
    return _file(path, "--truth: name a Parquet or CSV with key, lat, lon")


def _file(path: Path, wanted: str) -> Source:
    if not path.is_file():
        raise InputError(f"{path} is no file or folder that could be read as {wanted}")
    return Source(name=str(path), files=(path,))


def _run_above(path: Path) -> Path | None:
    """OUT of the run that a folder is of: itself, or what OUT/predictions, OUT/HEAD/predictions or OUT/HEAD lie in."""
    whole = path.absolute()
    above = whole.parents[:2] if whole.name == "predictions" else whole.parents[:1]
    is_part = whole.name == "predictions" or (whole / "predictions").is_dir()
    return path if is_run(path) else next((folder for folder in above if is_part and is_run(folder)), None)


def _none_yet(given: str, path: Path) -> str:
    if (path / "img_emb").is_dir():
        return f"{given} holds embeddings; predict from them: geoloc predict --from-embeddings {given}"
    return f"{given} holds no predictions yet: finish the run, as far as `geoloc status` says that it is"


def _parquets(folder: Path) -> tuple[Path, ...]:
    """In the order of the units: by number, and unit 1,000,000 has a longer name."""
    return tuple(sorted(folder.glob("*.parquet"), key=lambda path: (len(path.name), path.name)))


def _no_such_head(given: str, head: str, heads: list[str]) -> str:
    if not heads:
        return f"--head {head}: {given} holds the predictions of no named head; leave it out"
    near = difflib.get_close_matches(head, heads, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one: {_choices(heads)}"
    return f"--head {head}: {given} holds no predictions of such a head; {hint}"


def _choices(heads: dict[str, tuple[Path, ...]] | list[str]) -> str:
    return ", ".join(f"--head {name}" for name in heads)
