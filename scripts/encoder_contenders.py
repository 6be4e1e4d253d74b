"""Who runs in bench_encoder.py: ours, open_clip's and transformers' own forward, eager and compiled, the quick start.

Ours starts from bytes; the baselines are given floats that are normalised already. All give the pooled feature.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import count

import torch
from encoder_models import Case, encoder_of, normalized, open_clip_tower, traced, transformers_tower
from quick_start import QuickStart, processor_for, published_head
from stream_photos import street_photos
from torch import Tensor
from turns import MATMUL, MATMUL_FLOP, Job, matmul

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.arithmetic import DTYPES
from geoloc_batch.model.attention import check_sdpa
from geoloc_batch.model.clip import Clip
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.model.tower import attention_shape

OURS, OPEN_CLIP, TRANSFORMERS = "ours", "open_clip", "transformers"
QUICK_START = "quick start, batch 1, fp32"
NUM_CELLS = 1898


@dataclass(frozen=True)
class Contender:
    """One forward at one precision; or, by its name alone, the quick start's loop or the matrix product."""

    who: str
    precision: str = ""
    is_compiled: bool = False
    sdpa: str = ""
    """Ours: which kernel computes attention; "" as it is chosen."""
    compile_mode: str = ""
    """Ours: torch.compile's; "" as it is chosen."""

    @property
    def name(self) -> str:
        """Such as "ours bf16 compiled"."""
        chosen = "".join(f", {what}" for what in (self.sdpa and f"attention by {self.sdpa}", self.compile_mode) if what)
        return f"{self.who} {self.precision}{' compiled' * self.is_compiled}{chosen}".strip()


class Contenders:
    """Makes each of them once.

    Args:
        clip: the weights of ours and of open_clip; transformers has weights of its own, of the same shapes.
        case: the shapes.
        device: where they run.
        pixels: [B, 3, S, S] uint8 on the device.
        is_traced: make graphs and run them uncompiled: shows that compiling would get as far, in seconds.
    """

    def __init__(self, clip: Clip, case: Case, device: torch.device, pixels: Tensor, *, is_traced: bool) -> None:
        self.clip, self.case, self.device, self.pixels, self.is_traced = clip, case, device, pixels, is_traced
        self.job, self.encoder = cache(self._job), cache(self._make_encoder)
        self._tower = cache(self._make_tower)
        self._theirs: Callable[[], torch.nn.Module] = cache(lambda: transformers_tower(self.case))
        self._floats = cache(lambda precision: normalized(self.pixels).to(DTYPES[precision]))

    def is_there(self, contender: Contender) -> bool:
        """Whether its library is installed, and its kernels are for this device."""
        if contender.sdpa:
            try:
                check_sdpa(contender.sdpa, attention_shape(self.encoder(contender).tower), self.device)
            except ConfigError:
                print(f"{contender.name}: not on this device", file=sys.stderr)
                return False
        return contender.who not in (TRANSFORMERS, QUICK_START) or find_spec("transformers") is not None

    def images(self, contender: Contender) -> float:
        """That one call is worth: of the matrix product as many as its FLOPs would be."""
        if contender.who == MATMUL:
            return MATMUL_FLOP / self.case.flop()
        return 1 if contender.who == QUICK_START else self.case.batch

    def _job(self, contender: Contender) -> Job:
        if contender.who == MATMUL:
            return matmul(self.device)
        if contender.who == QUICK_START:
            return self._quick_start()
        if contender.who == OURS:
            encoder = self.encoder(contender)
            return lambda: encoder.encode(self.pixels)
        floats = self._floats(contender.precision)
        tower: Callable[[Tensor], object] = self._tower(contender.who, contender.precision)
        if contender.is_compiled:
            tower = torch.compile(tower, dynamic=False, backend="eager" if self.is_traced else "inductor")
        return lambda: tower(floats)

    def _make_encoder(self, contender: Contender) -> Encoder:
        # In the user's own compile cache: the main job asks for the very same graph.
        is_traced = contender.is_compiled and self.is_traced
        encoder = encoder_of(
            self.clip,
            self.case,
            self.device,
            contender.precision,
            compiled=contender.is_compiled and not is_traced,
            compile_cache="",
            sdpa=contender.sdpa,
            compile_mode=contender.compile_mode,
        )
        return traced(encoder) if is_traced else encoder

    def _make_tower(self, who: str, precision: str) -> torch.nn.Module:
        tower = open_clip_tower(self.clip) if who == OPEN_CLIP else copy.deepcopy(self._theirs())
        return tower.to(self.device, DTYPES[precision])

    def _quick_start(self) -> Job:
        head = published_head(self.case.width, NUM_CELLS)
        loop = QuickStart(copy.deepcopy(self._theirs()), processor_for(self.case.side), head, self.device)
        photos, turn = street_photos(4), count()
        return lambda: loop.best_cells(photos[next(turn) % len(photos)])
