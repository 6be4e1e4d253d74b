"""Builds the locators of a run from its settings: finds the files, names the results, refuses what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from geoloc_batch.errors import HeadError
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.locate.combine import CombinedLocator
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.locate.head_file import Head, read_head
from geoloc_batch.locate.locator import Locator
from geoloc_batch.locate.requests import Fetch, Request, find_requests, is_on_hub, local_cells, local_head
from geoloc_batch.locate.views import Fusion
from geoloc_batch.model.heads import HEADS_LICENCE
from geoloc_batch.model.hub import commit_of

log = logging.getLogger(__name__)

Features: TypeAlias = Literal["encoder", "stored", "foreign"]
"""Whence features come: an encoder, embeddings of ours, or embeddings of which only the user says what they are."""


class _Remedies(NamedTuple):
    """What is said of features that do not fit a head, and what helps."""

    gives: str
    other_tap: str
    other_encoder: str


_AGAIN = "embed the photos again with the encoder the head was trained on"
_REMEDIES: dict[Features, _Remedies] = {
    "encoder": _Remedies(
        "the encoder gives", "pass --tap {tap}", "give the encoder the head was trained on (--encoder)"
    ),
    "stored": _Remedies("the stored embeddings are", "embed the photos again with --tap {tap}", _AGAIN),
    "foreign": _Remedies(
        "the stored embeddings are taken for",
        "pass --tap {tap} if that is what they are, else embed the photos again with it",
        _AGAIN,
    ),
}


def build_locators(
    config: LocateConfig,
    *,
    encoder_dim: int,
    encoder_tap: str,
    encoder_sha256: str | None,
    device: str | torch.device,
    fetch: Fetch,
    features: Features = "encoder",
) -> list[Locator]:
    """The locators that `config` asks for, on `device`, each with a name of its own: with `combine` a single one.

    Args:
        config: heads, cells, top_k, position, fusion, combine.
        encoder_dim: width of the features that will come.
        encoder_tap: which features they are, pooled or projected.
        encoder_sha256: of the encoder's weights, None where it is not known.
        device: where the features will be.
        fetch: brings one file from the hub; called for hf: paths only.
        features: whence they come, which decides what helps where they do not fit a head.

    Raises:
        ConfigError: a name cannot be or stands twice, or a head has no cells.
        HeadError: a head's file is wrong, or does not fit the encoder, its tap or the cells.
        PartitionError: a file of cells is wrong.
    """
    requests = find_requests(config)
    partitions: dict[str, Partition] = {}
    # What lies here comes first: a refusal must not wait for a download.
    for request in requests:
        if not is_on_hub(request.cells) and request.cells not in partitions:
            partitions[request.cells] = load_partition(request.cells)
    locators: list[HeadLocator] = []
    for request in requests:
        path = local_head(request, fetch)
        head = read_head(path)
        _check_encoder(head, encoder_dim, encoder_tap, encoder_sha256, _REMEDIES[features])
        if request.cells not in partitions:
            partitions[request.cells] = load_partition(local_cells(request, fetch))
        locator = HeadLocator(
            head,
            partitions[request.cells],
            top_k=config.top_k,
            position=config.position,
            name=request.name,
            fusion=_fusion(config, head),
        )
        _tell(request, path, locator)
        locators.append(locator.to(device))
    if config.combine:
        return [CombinedLocator(locators, top_k=config.top_k, position=_common_position(locators))]
    return list(locators)


def _fusion(config: LocateConfig, head: Head) -> Fusion:
    """How views are fused: as asked for, else as the head was trained, else as the published heads' quick start."""
    if config.fusion != "auto":
        return config.fusion
    return "logit" if head.fusion == "logit" else "feature"


def _common_position(locators: Sequence[HeadLocator]) -> Literal["top1", "mean"]:
    """The position on which all heads agree, else the best cell's centroid."""
    return "mean" if all(locator.position == "mean" for locator in locators) else "top1"


def _tell(request: Request, path: Path, locator: HeadLocator) -> None:
    """One line about a head that is used, and a warning where it is not what the registry says."""
    head, stated = locator.head, request.published
    commit = commit_of(path)
    source = f"{request.file}@{commit[:12]}" if commit else request.file
    log.info(
        "head: %s (%d %s features, %d cells, position %s), %s, sha256 %s, licence %s",
        request.name,
        head.dim,
        head.tap,
        head.num_cells,
        locator.position,
        source,
        head.sha256[:12],
        HEADS_LICENCE if stated else "not stated",
    )
    if stated is not None and head.num_cells != stated.num_cells:
        log.warning(
            "%s has %d cells, the published table says %d: the repository has changed; the file is what counts",
            request.file,
            head.num_cells,
            stated.num_cells,
        )


def _check_encoder(head: Head, dim: int, tap: str, sha256: str | None, remedies: _Remedies) -> None:
    if head.tap != tap or head.dim != dim:
        remedy = remedies.other_tap.format(tap=head.tap) if head.tap != tap else remedies.other_encoder
        raise HeadError(
            f"{head.path} expects {head.dim} {head.tap} features, {remedies.gives} {dim} {tap} ones; {remedy}"
        )
    if sha256 is not None and head.encoder_sha256 not in (None, sha256):
        raise HeadError(
            f"{head.path} was trained on the encoder with sha256 {str(head.encoder_sha256)[:12]}, this one has "
            f"{sha256[:12]}; {remedies.other_encoder}"
        )
