"""What the jobs make of their settings alike: the locators, the outputs, and what is pinned of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.factory import Features, build_locators
from geoloc_batch.locate.locator import Locator
from geoloc_batch.model.hub import fetch
from geoloc_batch.run.config import RunConfig
from geoloc_batch.run.open_unit import Outputs

SCHEMA_VERSION = 1


def locators_of(
    config: LocateConfig | None,
    dim: int,
    tap: str,
    encoder_sha256: str | None,
    device: torch.device,
    features: Features = "encoder",
) -> list[Locator]:
    """The locators of a run whose features are such; none where nothing is located."""
    if config is None:
        return []
    return build_locators(
        config,
        encoder_dim=dim,
        encoder_tap=tap,
        encoder_sha256=encoder_sha256,
        device=device,
        fetch=fetch,
        features=features,
    )


def outputs_of(locators: Sequence[Locator], *, embeddings: bool, group_by: str = "") -> Outputs:
    """What is written: a tree of predictions for each of several locators."""
    trees = tuple(locator.name for locator in locators) if len(locators) > 1 else ("",) * len(locators)
    return Outputs(embeddings=embeddings, trees=trees, group_by=group_by)


def pinned_of(
    run: RunConfig, locate: LocateConfig | None, locators: Sequence[Locator], *, embeddings: bool, group_by: str = ""
) -> dict[str, Any]:
    """What decides the rows, apart from where the features come from."""
    pinned: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "limit": run.limit, "embeddings": embeddings}
    if locate is not None:
        # As it came out: `auto` is no setting of its own. Where heads differ, each has its own.
        positions = [locator.position for locator in locators]
        position = positions[0] if len(set(positions)) == 1 else positions
        pinned |= {"top_k": locate.top_k, "position": position}
        # A name counts where it names a folder of results: among several.
        names = [{"name": locator.name} if len(locators) > 1 else {} for locator in locators]
        pinned["heads"] = [{**name, **locator.identity} for name, locator in zip(names, locators, strict=True)]
    if locate is not None and locate.combine:
        pinned["combine"] = True
    if group_by:
        pinned |= {"group_by": group_by, "fusion": [fusion for locator in locators for fusion in locator.fusions]}
    return pinned
