"""What the stream holds in memory, measured in a process of its own; bench_stream.py starts it.

    python scripts/stream_memory.py pool 2 16 SHARD...
    python scripts/stream_memory.py stream 2 16 SHARD...

Prints {"photos", "peak_mb"}: the highest RssAnon, sampled every 5 ms. `pool` reads and decodes in as many threads,
one photo at a time each, and keeps nothing: what decoders need. `stream` runs BatchStream on the same shards, for a
consumer that holds all batches it may, so that the whole ring is in use.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Lock, Thread

from stream_contenders import RING, SIDE, units

from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import decode_photo, fit
from geoloc_batch.stream.samples import UnitReader


def main(arguments: Sequence[str]) -> None:
    """Run one of the two and print its peak."""
    kind, threads, batch_size, *shards = arguments
    peak = Peak()
    peak.start()
    photos = run_pool(shards, int(threads)) if kind == "pool" else run_stream(shards, int(threads), int(batch_size))
    print(json.dumps({"photos": photos, "peak_mb": peak.stop() / 1024}))


def run_pool(shards: Sequence[str], threads: int) -> int:
    """Decode all photos; returns how many."""
    samples = (item[1] for unit in units(tuple(shards)) for item in UnitReader(unit) if isinstance(item, tuple))
    reading, done = Lock(), []

    def work() -> None:
        while True:
            with reading:
                data = next(samples, None)
            if data is None:
                return
            done.append(fit(decode_photo(data), SIDE).shape)

    workers = [Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(done)


def run_stream(shards: Sequence[str], threads: int, batch_size: int) -> int:
    """Stream all photos; returns how many."""
    config, photos = StreamConfig(decode_threads=threads), 0
    held: deque[Batch] = deque()
    with BatchStream(units(tuple(shards)), side=SIDE, batch_size=batch_size, config=config, ring=RING) as batches:
        for item in batches:
            if isinstance(item, Batch):
                photos += len(item.samples)
                held.append(item)
                if len(held) == RING - 1:
                    held.popleft().release()
    return photos


class Peak(Thread):
    """The highest RssAnon of this process, in kB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak_kb = 0
        self._is_over = Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._is_over.wait(0.005):
            self._sample()

    def stop(self) -> int:
        """End; returns the peak."""
        self._is_over.set()
        self.join()
        self._sample()
        return self._peak_kb

    def _sample(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self._peak_kb = max(self._peak_kb, int(line.split()[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
