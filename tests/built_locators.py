"""Locators built as a run builds them, from files and from a folder that stands for the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import locate_samples as samples

from geoloc_batch.errors import HubError
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.factory import Features, build_locators
from geoloc_batch.locate.locator import Locator

PUBLISHED = "lebfla11/streetview-eu-geocell-heads"


class Hub:
    """Answers from a folder as the hub would, and records what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []

    def fetch(self, repo: str, filename: str) -> Path:
        self.asked.append((repo, filename))
        path = self.folder / repo / filename
        if not path.is_file():
            raise HubError(f"{repo}: no {filename}")
        return path


def build(
    heads: Sequence[object],
    cells: Sequence[object] = (),
    *,
    hub: Hub | None = None,
    dim: int = 5,
    tap: str = "pooled",
    sha256: str | None = None,
    features: Features = "encoder",
    **options: Any,
) -> list[Locator]:
    def no_hub(repo: str, filename: str) -> Path:
        raise AssertionError(f"{repo}/{filename} was asked of the hub")

    config = LocateConfig(head=tuple(map(str, heads)), cells=tuple(map(str, cells)), **options)
    fetch = hub.fetch if hub else no_hub
    return build_locators(
        config,
        encoder_dim=dim,
        encoder_tap=tap,
        encoder_sha256=sha256,
        device="cpu",
        fetch=fetch,
        features=features,
    )


def names(heads: Sequence[object], cells: Sequence[object] = (), **options: Any) -> list[str]:
    return [locator.name for locator in build(heads, cells, **options)]


def put_published(hub: Hub, *, num_cells: int = 9, dim: int = 5) -> None:
    folder = hub.folder / PUBLISHED
    samples.write_head(folder / "ablation_v13_weighted" / "lam_0.05", num_cells=num_cells, dim=dim, cells=False)
    cells = folder / "data_collection" / "outputs" / "geocells_h3_res4_eu"
    cells.mkdir(parents=True, exist_ok=True)
    samples.make_partition(num_cells).save(cells / "geocell_info.json")


DEFAULT_FILES = [
    (PUBLISHED, "data_collection/outputs/geocells_h3_res4_eu/geocell_info.json"),
    (PUBLISHED, "ablation_v13_weighted/lam_0.05/best.pt"),
]
