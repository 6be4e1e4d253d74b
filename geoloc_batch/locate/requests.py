"""What --head and --cells ask for: which file each head and its cells are, and what its results are called.

Nothing is fetched or read here, so that a refusal waits for no download. Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from geoloc_batch.errors import ConfigError, HeadError, HubError
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.model.heads import DEFAULT_HEAD, PublishedHead, near_names, published

CELLS_FILE = "geocell_info.json"

Fetch = Callable[[str, str], Path]
"""Brings one file from the hub: (OWNER/REPO, path in it) to a path here."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Folders of a run's own, in which a head's folder would be taken for results of another kind.
_RESERVED = ("img_emb", "metadata", "predictions", "errors", "run.json", "plan.parquet")
# A NAME= has no slash and no colon, so that runs/lr=0.1/best.pt and hf:... stay what they are.
_NAMED = re.compile(r"([^/\\:=]*)=(.+)", re.DOTALL)
_HUB = "hf:"


class Request(NamedTuple):
    """One head that is asked for."""

    file: str
    """A path, or hf:OWNER/REPO/PATH."""
    name: str
    """What its results are called; no two alike, whatever the case of letters."""
    cells: str
    """Its cells, likewise a path or hf:..."""
    published: PublishedHead | None = None
    """What the registry says of it, where it is one of the published heads."""


class _Given(NamedTuple):
    """A --head as it was given: where its file is, the name in NAME=, its short name."""

    file: str
    name: str | None
    published: PublishedHead | None
    is_short: bool


def find_requests(config: LocateConfig) -> list[Request]:
    """The heads that `config` asks for, in its order.

    Raises:
        ConfigError: a name cannot be or stands twice, an hf: path is none, or a head has no cells.
        HeadError: there is no such file and no such published head.
    """
    given = [_given(text) for text in config.head or (DEFAULT_HEAD.name,)]
    names = _names(given)
    all_cells: Sequence[str | None] = (
        config.cells if len(config.cells) == len(given) else (config.cells or (None,)) * len(given)
    )
    requests = []
    for head, name, cells in zip(given, names, all_cells, strict=True):
        _refuse_absent(head.file)
        request = Request(head.file, name, cells or _cells_of(head), head.published)
        for file in (request.file, request.cells):
            if is_on_hub(file):
                _hub_parts(file)
        requests.append(request)
    return requests


def is_on_hub(file: str) -> bool:
    """Whether it has to be fetched, or taken from the cache."""
    return file.startswith(_HUB)


def local_head(request: Request, fetch: Fetch) -> Path:
    """The head's file here.

    Raises:
        HubError: it could not be had.
    """
    return _local(request.file, fetch)


def local_cells(request: Request, fetch: Fetch) -> Path:
    """The file of its cells here.

    Raises:
        HubError: it could not be had.
    """
    try:
        return _local(request.cells, fetch)
    except HubError as error:
        if request.published is not None and request.cells == request.published.cells:
            # The card names one of these paths and gives a pattern for the others: it may be that one is elsewhere.
            error.add_note(
                f"the cells of {request.published.name} were looked for at {request.cells}; if you have them, or know "
                f"where else they are, give that with --cells"
            )
        raise


def _given(text: str) -> _Given:
    """A --head in its parts; a file that is there under the whole text is no NAME=FILE."""
    head = published(text)
    if head is not None:
        return _Given(head.file, None, head, is_short=text == head.name)
    named = _NAMED.fullmatch(text)
    if named is None or Path(text).is_file():
        return _Given(text, None, None, is_short=False)
    name, file = named.groups()
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--head {text}: the name {name!r} must begin with a letter or digit and hold only letters, digits, . _ -"
        )
    if name.lower() in _RESERVED:
        raise ConfigError(f"--head {text}: {name} is a name of the output folder's own; give the head another one")
    head = published(file)
    return _Given(head.file if head else file, name, head, is_short=False)


def _names(heads: Sequence[_Given]) -> list[str]:
    """One name for each, the user's where given, else the short name, else from the path."""
    taken: dict[str, str] = {}
    for head in heads:
        if head.name is None:
            continue
        if head.name.lower() in taken:
            other = taken[head.name.lower()]
            raise ConfigError(f"two heads are named {head.name}: {other} and {head.file}; give each its own NAME=")
        taken[head.name.lower()] = head.file
    names = []
    for head in heads:
        name = head.name
        if name is None:
            stem = head.published.name if head.published and head.is_short else _derived_name(head.file)
            name, count = stem, 1
            while name.lower() in taken or name.lower() in _RESERVED:
                count += 1
                name = f"{stem}-{count}"
            taken[name.lower()] = head.file
        names.append(name)
    return names


def _derived_name(file: str) -> str:
    """lam_0.05 for .../lam_0.05/best.pt, north for north.safetensors."""
    # Not resolved: in the hub's cache a head is a link to a file that is named after its hash.
    path = Path(file) if is_on_hub(file) else Path(file).absolute()
    name = path.parent.name if path.stem == "best" else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "head"


def _refuse_absent(file: str) -> None:
    if is_on_hub(file) or Path(file).exists():
        return
    if "/" in file or Path(file).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise HeadError(f"no such head: {file}; give a best.pt or .safetensors file with --head")
    near = near_names(file)
    guess = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise HeadError(
        f"no such head: {file}{guess} `geoloc heads` lists the published ones; of your own give the best.pt or "
        ".safetensors file"
    )


def _cells_of(head: _Given) -> str:
    """The cells of a head for which none were given."""
    if head.published is not None:
        return head.published.cells
    if is_on_hub(head.file):
        raise ConfigError(f"the head {head.file} has no cells: give its {CELLS_FILE} with --cells")
    beside = Path(head.file).parent / CELLS_FILE
    if beside.is_file():
        return str(beside)
    raise ConfigError(
        f"the head {head.file} has no cells: give its {CELLS_FILE} with --cells, or put it beside the head"
    )


def _local(file: str, fetch: Fetch) -> Path:
    return fetch(*_hub_parts(file)) if is_on_hub(file) else Path(file)


def _hub_parts(file: str) -> tuple[str, str]:
    """(OWNER/REPO, PATH) of hf:OWNER/REPO/PATH."""
    parts = file.removeprefix(_HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ConfigError(f"{file} must be hf:OWNER/REPO/PATH")
    return "/".join(parts[:2]), parts[2]
