"""Features of places: read once, fused once where nothing random is done to the views, held whole or mapped.

LayerNorm without its scale and shift has nothing to learn, so that it is done here, in float64, once.

Shape letters: R rows of all pairs, S stored rows, V views, L places, N places asked for, D features.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from geoloc_batch.errors import GeolocError, InputError
from geoloc_batch.locate.posterior import LAYER_NORM_EPS
from geoloc_batch.run.first_batch import free_bytes
from geoloc_batch.train.config import Fusion
from geoloc_batch.train.group import ALONE, Group
from geoloc_batch.train.places import Places

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

Kind = Literal["fused", "normed-views", "raw-views"]
"""What is stored: each place's normed mean of raw features; each view normed; each view raw."""

CHUNK_ROWS = 4096
_MIN_DEVIATION = 1e-6
MAX_SHARE = 0.6
"""Of the free memory, that features may take."""


def kind_of(fusion: Fusion, view_dropout: float) -> Kind:
    """What has to be stored for a fusion: views only where something random is done to them."""
    if fusion == "logit":
        return "normed-views"
    return "raw-views" if view_dropout else "fused"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Features:
    """Rows of L places, on the device or in a mapped file."""

    kind: Kind
    value_SD: Tensor
    """[S, D] float32, S = L for `fused`."""
    slot_V: Tensor | None
    """[V] the stored row of each view, sorted by place; None for `fused`."""
    offset_L1: Tensor | None
    """[L + 1] the views of place i are offset[i] to offset[i + 1]; None for `fused`."""
    is_good_L: NDArray[np.bool_]
    """[L] whether a place has a view without NaN and infinities."""
    num_bad_rows: int
    """Rows with NaN or infinities, which are in none of these."""
    sha256: str
    """Of the rows that show a place as they are stored, in the order of their files: the same for all kinds."""
    device: torch.device
    """Where batches go."""
    is_mapped: bool
    """Whether the rows lie in a file."""

    @property
    def dim(self) -> int:
        """D."""
        return self.value_SD.shape[1]

    @property
    def left_out(self) -> dict[str, int]:
        """Rows and places that train nothing, by reason."""
        counts = {
            "rows whose features hold NaN or infinities": self.num_bad_rows,
            "places without a row of finite features": int((~self.is_good_L).sum()),
        }
        return {reason: count for reason, count in counts.items() if count}

    def rows(self, slot_N: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, D] copies of stored rows on the device, in `out` where it is given."""
        if self.value_SD.device == self.device:
            return torch.index_select(self.value_SD, 0, slot_N, out=out)
        found_ND = torch.index_select(self.value_SD, 0, slot_N.to(self.value_SD.device)).to(self.device)
        return found_ND if out is None else out.copy_(found_ND)

    def views(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """([n] the stored rows of the places' views, place after place; [N] how many each has)."""
        assert self.offset_L1 is not None
        assert self.slot_V is not None
        start_N = self.offset_L1[place_N]
        count_N = self.offset_L1[place_N + 1] - start_N
        before_N = count_N.cumsum(0) - count_N
        view_n = torch.arange(int(count_N.sum()), device=place_N.device) + (start_N - before_N).repeat_interleave(
            count_N
        )
        return self.slot_V[view_n], count_N

    def fused(self, place_N: Tensor) -> Tensor:
        """[N, D] what a place's views come to without dropout, before LayerNorm's scale and shift."""
        if self.kind == "fused":
            return self.rows(place_N)
        slot_n, count_N = self.views(place_N)
        mean_ND = mean_of_views(self.rows(slot_n), count_N.to(self.device))
        return mean_ND if self.kind == "normed-views" else normed(mean_ND)


def mean_of_views(view_nD: Tensor, count_N: Tensor) -> Tensor:
    """[N, D] means of consecutive rows, count_N[i] of them for the i-th."""
    if not len(count_N):
        return view_nD
    num_views = len(view_nD) // len(count_N)
    if len(view_nD) == num_views * len(count_N) and bool((count_N == num_views).all()):
        return view_nD.view(len(count_N), num_views, -1).mean(dim=1)
    mean: Tensor = torch.segment_reduce(view_nD, "mean", lengths=count_N)
    return mean


def normed(feature_ND: Tensor) -> Tensor:
    """LayerNorm without scale and shift, in the features' own dtype."""
    return functional.layer_norm(feature_ND, feature_ND.shape[1:], eps=LAYER_NORM_EPS)


def moments(features: Features, place_N: Ints) -> tuple[Tensor, Tensor]:
    """[D] mean and [D] deviation of places' normed features, on the CPU, summed in float64."""
    device = features.device
    place = torch.from_numpy(place_N).to(device)
    total_D = torch.zeros(features.dim, dtype=torch.float64, device=device)
    for place_n in torch.split(place, CHUNK_ROWS):
        total_D += features.fused(place_n).double().sum(dim=0)
    mean_D = total_D / len(place)
    square_D = torch.zeros_like(total_D)
    for place_n in torch.split(place, CHUNK_ROWS):
        square_D += (features.fused(place_n).double() - mean_D).square().sum(dim=0)
    deviation_D = (square_D / len(place)).sqrt()
    # What never varies tells nothing: it is left as it is, not blown up.
    deviation_D = torch.where(deviation_D > _MIN_DEVIATION, deviation_D, 1.0)
    return mean_D.float().cpu(), deviation_D.float().cpu()


def load_features(
    places: Places, kind: Kind, device: torch.device, *, hold: str, scratch: Path, group: Group = ALONE
) -> Features:
    """Read all rows once, in the order of their files.

    Args:
        places: which rows show which place.
        kind: what to store.
        device: where training is.
        hold: `memory`, `disk`, or `auto`, which takes memory where that leaves enough of it.
        scratch: folder for the nameless file of `disk`; it vanishes with the process, however that ends.
        group: the ranks that do the same on this machine, each for itself.

    Raises:
        InputError: a file has changed since its metadata were read, or cannot be read.
        GeolocError: the scratch file does not fit on the disk.
    """
    slot_R = places.place_R if kind == "fused" else _numbered(places.place_R)
    num_slots = int(slot_R.max(initial=-1)) + 1
    in_memory = hold == "memory" or (hold == "auto" and _fits(num_slots * places.dim * 4, device, group))
    value_SD = np.zeros((num_slots, places.dim), np.float32) if in_memory else _mapped(scratch, num_slots, places.dim)
    count_S = np.zeros(num_slots, dtype=np.int64)
    num_bad = 0
    digest = hashlib.sha256()
    for slot_n, feature_nD in _read(places, slot_R, digest.update):
        is_good_n = np.isfinite(feature_nD).all(axis=1)
        if not is_good_n.all():
            num_bad += int((~is_good_n).sum())
            slot_n, feature_nD = slot_n[is_good_n], feature_nD[is_good_n]
        _add(value_SD, count_S, slot_n, feature_nD)
    is_good_S = count_S > 0
    if kind != "raw-views":
        _norm_in_place(value_SD, count_S, is_good_S)
    stored = torch.from_numpy(value_SD)
    if in_memory:
        stored = stored.to(device)
    slot_V, offset_L1, is_good_L = None, None, is_good_S
    if kind != "fused":
        slot_V, count_L = _views(places, slot_R, is_good_S)
        offset_L1, is_good_L = np.concatenate([[0], np.cumsum(count_L)]), count_L > 0
    return Features(
        kind=kind,
        value_SD=stored,
        slot_V=None if slot_V is None else torch.from_numpy(slot_V).to(device),
        offset_L1=None if offset_L1 is None else torch.from_numpy(offset_L1).to(device),
        is_good_L=is_good_L,
        num_bad_rows=num_bad,
        sha256=digest.hexdigest(),
        device=device,
        is_mapped=not in_memory,
    )


def _fits(num_bytes: int, device: torch.device, group: Group) -> bool:
    # Each rank has all features: which ones it needs is drawn anew in each epoch.
    share = free_bytes(torch.device("cpu")) / group.num_on_machine
    if device.type == "cuda":
        # They are gathered in the machine's memory before they go over.
        share = min(share, free_bytes(device) / group.num_on_device)
    return num_bytes <= MAX_SHARE * share


def _mapped(folder: Path, num_rows: int, dim: int) -> Floats32:
    num_bytes = max(1, num_rows * dim * 4)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # The blocks are taken now: a full disk is an error here, and a killed process later.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.memmap(file, dtype=np.float32, mode="r+", shape=(num_rows, dim))
    except OSError as error:
        raise GeolocError(
            f"the features take {num_bytes / 1e6:.3g} MB, and {folder} cannot hold a scratch file of that size: "
            f"{error.strerror or error}; make room on its disk, give an --out on another, or pass --hold memory"
        ) from error


def _numbered(place_R: Ints) -> Ints:
    """[R] the rows that show a place, numbered in their order; -1 for the others."""
    is_kept_R = place_R >= 0
    return np.where(is_kept_R, np.cumsum(is_kept_R) - 1, -1)


def _read(places: Places, slot_R: Ints, feed: Callable[[memoryview], object]) -> Iterator[tuple[Ints, Floats32]]:
    """([n] slots, [n, D] raw features) of the rows that have a slot, chunk by chunk; `feed` is given them as stored."""
    first = 0
    for pair in places.pairs:
        for start in range(0, pair.num_rows, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, pair.num_rows)
            slot_n = slot_R[first + start : first + stop]
            is_kept = slot_n >= 0
            if is_kept.any():
                try:
                    row_nD = pair.stored(start, stop)
                except OSError as error:
                    raise InputError(f"{pair.npy} cannot be read: {error}; write the embeddings again") from error
                feed((row_nD if is_kept.all() else row_nD[is_kept]).data)
                feature_nD = pair.restored(row_nD, start)
                yield (slot_n, feature_nD) if is_kept.all() else (slot_n[is_kept], feature_nD[is_kept])
        first += pair.num_rows


def _add(sum_SD: Floats32, count_S: Ints, slot_n: Ints, feature_nD: Floats32) -> None:
    """Add rows to their slots. Sums of a slot's rows are formed in the order of the file, whatever the slots."""
    if not len(slot_n):
        return
    if (np.diff(slot_n) < 0).any():
        order = np.argsort(slot_n, kind="stable")
        slot_n, feature_nD = slot_n[order], feature_nD[order]
    begin = np.flatnonzero(np.diff(slot_n, prepend=-1))
    # A sum beyond float32 makes its place one without features, like NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        sums = feature_nD if len(begin) == len(slot_n) else np.add.reduceat(feature_nD, begin, axis=0)
        sum_SD[slot_n[begin]] += sums
    count_S[slot_n[begin]] += np.diff(begin, append=len(slot_n))


def _norm_in_place(value_SD: Floats32, count_S: Ints, is_good_S: NDArray[np.bool_]) -> None:
    for start in range(0, len(value_SD), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        wide = torch.from_numpy(value_SD[rows]).double() / torch.from_numpy(np.maximum(count_S[rows], 1))[:, None]
        value_SD[rows] = normed(wide).numpy()
        # Finite rows of which the sum is none.
        is_good_S[rows] &= np.isfinite(value_SD[rows]).all(axis=1)


def _views(places: Places, slot_R: Ints, is_good_S: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """([V] slots of the good views, sorted by place; [L] how many each place has)."""
    row = np.flatnonzero(slot_R >= 0)
    row = row[is_good_S[slot_R[row]]]
    place = places.place_R[row]
    order = np.argsort(place, kind="stable")
    return slot_R[row][order], np.bincount(place, minlength=len(places))
