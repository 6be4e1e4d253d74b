"""Builds the locators of a run from its settings: finds the files, names the results, refuses what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from geoloc_batch.errors import ConfigError, HeadError
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.locate.head_file import Head, read_head
from geoloc_batch.locate.locator import Locator

_PUBLISHED = "hf:lebfla11/streetview-eu-geocell-heads"
DEFAULT_HEAD = f"{_PUBLISHED}/ablation_v13_weighted/lam_0.05/best.pt"
"""The published European head: LayerNorm and Linear on StreetCLIP's pooled features, 1,898 H3 cells."""
DEFAULT_CELLS = f"{_PUBLISHED}/data_collection/outputs/geocells_h3_res4_eu/geocell_info.json"
"""Its partition."""

CELLS_FILE = "geocell_info.json"

Fetch = Callable[[str, str], Path]
"""Brings one file from the hub: (OWNER/REPO, path in it) to a path here."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Folders of a run's own, in which a head's folder would be taken for results of another kind.
_RESERVED = ("img_emb", "metadata", "predictions", "errors", "run.json", "plan.parquet")
# A NAME= has no slash and no colon, so that runs/lr=0.1/best.pt and hf:... stay what they are.
_NAMED = re.compile(r"([^/\\:=]*)=(.+)", re.DOTALL)


class _Request(NamedTuple):
    """One --head: where its file is, the name the user gave it, where its cells are."""

    file: str
    name: str | None
    cells: str | None


def build_locators(
    config: LocateConfig,
    *,
    encoder_dim: int,
    encoder_tap: str,
    encoder_sha256: str | None,
    device: str | torch.device,
    fetch: Fetch,
) -> list[Locator]:
    """The locators that `config` asks for, on `device`, each with a name of its own.

    Args:
        config: heads, cells, top_k, position.
        encoder_dim: width of the features that will come.
        encoder_tap: which features they are, pooled or projected.
        encoder_sha256: of the encoder's weights, None where it is not known.
        device: where the features will be.
        fetch: brings one file from the hub; called for hf: paths only.

    Raises:
        ConfigError: a name cannot be or stands twice, or a head has no cells.
        HeadError: a head's file is wrong, or does not fit the encoder, its tap or the cells.
        PartitionError: a file of cells is wrong.
    """
    requests = _requests(config)
    names = _names(requests)
    partitions: dict[str, Partition] = {}
    locators: list[Locator] = []
    # Cells beside heads are looked for before anything is fetched: a refusal must not wait for a download.
    all_cells = [request.cells or _cells_beside(request.file) for request in requests]
    for request, name, cells in zip(requests, names, all_cells, strict=True):
        if cells not in partitions:
            partitions[cells] = load_partition(_local(cells, fetch))
        head = read_head(_local(request.file, fetch))
        _check_encoder(head, encoder_dim, encoder_tap, encoder_sha256)
        locator = HeadLocator(head, partitions[cells], top_k=config.top_k, position=config.position, name=name)
        locators.append(locator.to(device))
    return locators


def _requests(config: LocateConfig) -> list[_Request]:
    heads = config.head or (DEFAULT_HEAD,)
    cells: Sequence[str | None] = (
        config.cells if len(config.cells) == len(heads) else (config.cells or (None,)) * len(heads)
    )
    requests = []
    for text, its_cells in zip(heads, cells, strict=True):
        name, file = _split_name(text)
        requests.append(_Request(file, name, its_cells or (DEFAULT_CELLS if file == DEFAULT_HEAD else None)))
    return requests


def _split_name(text: str) -> tuple[str | None, str]:
    """NAME=FILE in its parts; a file that is there under the whole text is no NAME=FILE."""
    named = _NAMED.fullmatch(text)
    if named is None or Path(text).is_file():
        return None, text
    name, file = named.groups()
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--head {text}: the name {name!r} must begin with a letter or digit and hold only letters, digits, . _ -"
        )
    if name.lower() in _RESERVED:
        raise ConfigError(f"--head {text}: {name} is a name of the output folder's own; give the head another one")
    return name, file


def _names(requests: Sequence[_Request]) -> list[str]:
    """One name for each, the user's where given, else from the path; no two alike, whatever the case of letters."""
    taken: dict[str, str] = {}
    for request in requests:
        if request.name is None:
            continue
        if request.name.lower() in taken:
            other = taken[request.name.lower()]
            raise ConfigError(
                f"two heads are named {request.name}: {other} and {request.file}; give each its own NAME="
            )
        taken[request.name.lower()] = request.file
    names = []
    for request in requests:
        name = request.name
        if name is None:
            stem = _derived_name(request.file)
            name, count = stem, 1
            while name.lower() in taken or name.lower() in _RESERVED:
                count += 1
                name = f"{stem}-{count}"
            taken[name.lower()] = request.file
        names.append(name)
    return names


def _derived_name(file: str) -> str:
    """lam_0.05 for .../lam_0.05/best.pt, north for north.safetensors."""
    # Not resolved: in the hub's cache a head is a link to a file that is named after its hash.
    path = Path(file) if file.startswith("hf:") else Path(file).absolute()
    name = path.parent.name if path.stem == "best" else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "head"


def _local(file: str, fetch: Fetch) -> Path:
    if not file.startswith("hf:"):
        return Path(file)
    parts = file.removeprefix("hf:").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ConfigError(f"{file} must be hf:OWNER/REPO/PATH")
    return fetch("/".join(parts[:2]), parts[2])


def _cells_beside(file: str) -> str:
    if file.startswith("hf:"):
        raise ConfigError(f"the head {file} has no cells: give its {CELLS_FILE} with --cells")
    beside = Path(file).parent / CELLS_FILE
    if beside.is_file():
        return str(beside)
    if not Path(file).exists():
        raise HeadError(f"no such head: {file}; give a best.pt or .safetensors file with --head")
    raise ConfigError(f"the head {file} has no cells: give its {CELLS_FILE} with --cells, or put it beside the head")


def _check_encoder(head: Head, dim: int, tap: str, sha256: str | None) -> None:
    if head.tap != tap or head.dim != dim:
        remedy = f"pass --tap {head.tap}" if head.tap != tap else "give the encoder the head was trained on (--encoder)"
        raise HeadError(
            f"{head.path} expects {head.dim} {head.tap} features, the encoder gives {dim} {tap} ones; {remedy}"
        )
    if sha256 is not None and head.encoder_sha256 not in (None, sha256):
        raise HeadError(
            f"{head.path} was trained on the encoder with sha256 {str(head.encoder_sha256)[:12]}, this one has "
            f"{sha256[:12]}; give the encoder the head was trained on (--encoder)"
        )
