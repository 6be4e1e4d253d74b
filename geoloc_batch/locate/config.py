"""Settings of locating. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.home import expand_home


@dataclass(frozen=True, kw_only=True, slots=True)
class LocateConfig:
    """Which heads propose places, and what is kept of their answer."""

    head: tuple[str, ...] = ()
    """A head's file (best.pt or .safetensors), the short name of a published one (`geoloc heads` lists them), or
    hf:OWNER/REPO/PATH; repeat the flag for several heads in one pass. NAME=HEAD names its output folder. None given
    takes eu-h3r4-v13, the published European head. A short name always means the published head: write ./NAME for a
    file of that name."""
    cells: tuple[str, ...] = ()
    """geocell_info.json of the head's partition: one for all heads, or one for each in the same order. None given takes
    the file beside the head, or the published head's own."""
    top_k: int = 5
    """Cells kept per photo."""
    position: Literal["auto", "top1", "mean"] = "auto"
    """What lat and lon are. top1: the best cell's centroid; mean: the posterior mean on the sphere; auto: the one that
    suits the head, where its head.json or its file says so, else top1."""
    fusion: Literal["auto", "feature", "logit"] = "auto"
    """With --group-by: how the photos of a location become one answer. feature: the mean of their features is located,
    as in the published heads' quick start; logit: the mean of the head's logits; auto: as the head was trained
    (head.json), else feature."""
    combine: bool = False
    """Ask all heads together: one answer, on the partition with the most cells, whose probabilities are the products of
    those of each head's own cells. Needs at least two heads."""

    def __post_init__(self) -> None:
        if self.combine and len(self.head) < 2:
            raise ConfigError(f"--combine needs at least two heads, got {len(self.head)}; repeat --head")
        if self.top_k < 1:
            raise ConfigError(f"--top-k must be at least 1, got {self.top_k}")
        if len(self.cells) > 1 and len(self.cells) != len(self.head):
            raise ConfigError(
                f"--cells was given {len(self.cells)} times for {len(self.head)} --head; "
                "give it once, or once for each head"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """List the published heads, and say which of them are in the local cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertHeadConfig:
    """Write a head's tensors, and what is known of it, as .safetensors or as a best.pt like the published ones.

    Tensors are written as float32, which is what heads compute in.
    """

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """The head: a file, the short name of a published one, or hf:OWNER/REPO/PATH."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The file to write; its name ends in .safetensors, .pt or .pth. One that is there is replaced."""
    trust: bool = False
    """Execute the code in SOURCE, with all that you may do, if it cannot be read without. Only for a file whose maker
    you trust; what is written holds no code."""

    def __post_init__(self) -> None:
        for name in ("source", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name.upper()} must not be empty: name the file")
        expand_home(self, {"source", "out"})
