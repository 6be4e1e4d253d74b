"""FirstBatch: what the run's precision costs, seen on a few of its own first photos, for `_logs/`.

Shape letters: B batch, D features, N photos of the sample.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoloc_batch.locate.locator import Locator
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.run.encoders import REFERENCE, reference_of
from geoloc_batch.run.fidelity import compare
from geoloc_batch.run.transfer import Features, Flight, Transfer
from geoloc_batch.stream.batch import Batch

log = logging.getLogger("geoloc_batch")

NUM_PHOTOS = 16
"""Of the first batch; one with fewer is left alone: a run of a few photos would mostly do this."""
MAX_SECONDS = 5.0
"""For computing in fp32; the photos that were not reached by then are left out."""
_MARGIN_BYTES = 1 << 30


class FirstBatch:
    """Compares the first batch of a run with fp32, once. What prevents it is written down, never raised.

    Args:
        encoder: of the run.
        locators: of the run.
        path: of the JSON file that gets the figures.
    """

    def __init__(self, encoder: Encoder, locators: Sequence[Locator], path: Path) -> None:
        self._encoder, self._locators, self._path = encoder, locators, path

    def watch(self, batch: Batch, transfer: Transfer) -> Flight:
        """Start a batch; when it has landed, it is compared in the thread that takes its features."""
        if len(batch.samples) < NUM_PHOTOS:
            self._write({"skipped": f"the first batch holds {len(batch.samples)} photos, fewer than {NUM_PHOTOS}"})
            return transfer.start(batch)
        # Copied first, since the batch's buffer goes back to the decoders.
        pixels_N3SS = batch.pixels[:NUM_PHOTOS].clone(memory_format=torch.preserve_format)
        return _Watched(transfer.start(batch), lambda features: self._compare(pixels_N3SS, features))

    def _compare(self, pixels_N3SS: Tensor, features: Features) -> None:
        started = time.perf_counter()
        try:
            figures = self._figures(pixels_N3SS, features)
        except Exception as error:
            # Memory that ends, for one: it is not the run's business.
            figures = {"skipped": f"{type(error).__name__}: {error}"}
        self._write({**figures, "seconds": round(time.perf_counter() - started, 3)})

    def _figures(self, pixels_N3SS: Tensor, features: Features) -> dict[str, Any]:
        encoder = self._encoder
        needed = 4 * sum(parameter.numel() for parameter in encoder.tower.parameters()) + _MARGIN_BYTES
        free = free_bytes(encoder.device)
        if free < needed:
            return {"skipped": f"{free / 1e9:.1f} GB of memory are free, {needed / 1e9:.1f} GB may be needed"}
        reference = reference_of(encoder)
        started = time.perf_counter()
        rows = []
        for row in range(len(pixels_N3SS)):
            rows.append(reference(pixels_N3SS[row : row + 1])[0].cpu().numpy())
            if time.perf_counter() - started > MAX_SECONDS:
                break
        found = compare(encoder.precision, features.host_BD[: len(rows)].copy(), np.stack(rows), self._locators)
        if found is None:
            return {"skipped": f"none of {len(rows)} photos has finite features"}
        log.info(
            "%s against %s on %d photos: cosine %.6f at least",
            found.precision,
            REFERENCE,
            found.photos,
            found.cosine_min,
        )
        return asdict(found)

    def _write(self, figures: dict[str, Any]) -> None:
        try:
            self._path.write_text(json.dumps({"time": time.time(), **figures}) + "\n", encoding="utf-8")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)


class _Watched:
    """A flight whose features are looked at before they are used."""

    def __init__(self, flight: Flight, look: Callable[[Features], None]) -> None:
        self._flight, self._look = flight, look

    def wait(self) -> None:
        """See Flight."""
        self._flight.wait()

    def landed(self) -> AbstractContextManager[Features]:
        """See Flight."""
        return self._looked_at()

    @contextmanager
    def _looked_at(self) -> Iterator[Features]:
        with self._flight.landed() as features:
            self._look(features)
            yield features


def free_bytes(device: torch.device) -> int:
    """Memory that could be had on a device; on a CPU without what the kernel would have to swap for."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
