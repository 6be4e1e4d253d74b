"""What the stream measures of itself: who worked, who waited for whom, and how much stood between them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple


class Depth:
    """How many things stand in a queue, now and on average over time. Changed under its owner's lock."""

    def __init__(self) -> None:
        self.now = 0
        self._area_s = 0.0
        self._since = time.perf_counter()

    def add(self, change: int) -> None:
        """So many came, or went."""
        now = time.perf_counter()
        self._area_s += self.now * (now - self._since)
        self.now, self._since = self.now + change, now

    def area_s(self) -> float:
        """Things x seconds: over a time it gives the mean number."""
        self.add(0)
        return self._area_s


class Counts(NamedTuple):
    """What the exchange knows of it; see StreamStats."""

    photos: int
    samples_queued: int
    bytes_queued: int
    batches_ready: int
    samples_queued_area_s: float
    batches_ready_area_s: float
    pack_busy_s: float
    room_wait_s: float
    photo_wait_s: float
    ring_wait_s: float
    consumer_wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """What the stream has done so far, and what stands in it now. A wait counts when it is over."""

    seconds: float
    """Since the iteration began, until it ended."""
    photos: int
    """Photos packed or refused."""
    bytes_read: int
    """Bytes of the shards, passed over ones included."""
    decode_threads: int

    read_busy_s: float
    """Seconds that the reader was reading, waits for a server among it, waits for room left out."""
    decode_busy_s: float
    """Seconds of decoding, resizing and packing, summed over the threads, waits left out."""
    pack_busy_s: float
    """The part of decode_busy_s that copied photos into batches."""

    room_wait_s: float
    """Seconds that the reader waited because enough photos wait already: decoding was the slower side."""
    photo_wait_s: float
    """Seconds that decode threads waited for a photo, summed: reading was the slower side."""
    memory_wait_s: float
    """Seconds that decode threads waited for their share of --decode-memory-mb, summed."""
    ring_wait_s: float
    """Seconds that decode threads waited for a free batch, summed: the consumer was the slower side."""
    consumer_wait_s: float
    """Seconds that the consumer waited: the stream was the slower side."""

    samples_queued: int
    """Photos that wait for a decode thread."""
    bytes_queued: int
    """Their bytes."""
    batches_ready: int
    """Batches that wait for the consumer."""
    mean_samples_queued: float
    """samples_queued on average over `seconds`."""
    mean_batches_ready: float
    """batches_ready on average over `seconds`."""

    @property
    def read_busy(self) -> float:
        """Share of `seconds` that the reader was reading, 0 to 1."""
        return self._share(self.read_busy_s)

    @property
    def decode_busy(self) -> float:
        """Share of the decode threads' time that they decoded, resized and packed, 0 to 1."""
        return self._share(self.decode_busy_s / max(1, self.decode_threads))

    @property
    def pack_busy(self) -> float:
        """Share of the decode threads' time that they packed, 0 to 1; part of decode_busy."""
        return self._share(self.pack_busy_s / max(1, self.decode_threads))

    @property
    def limiting_stage(self) -> str:
        """The busiest stage, for which the others waited: "read", "decode" or "consumer".

        A decode thread that waits for memory counts as busy: see memory_wait_s. The consumer is busy when it does not
        wait for the stream.
        """
        busy_s = {
            "decode": (self.decode_busy_s + self.memory_wait_s) / max(1, self.decode_threads),
            "read": self.read_busy_s,
            "consumer": self.seconds - self.consumer_wait_s,
        }
        return max(busy_s, key=lambda stage: busy_s[stage])

    def _share(self, busy_s: float) -> float:
        return min(1.0, busy_s / self.seconds) if self.seconds else 0.0
