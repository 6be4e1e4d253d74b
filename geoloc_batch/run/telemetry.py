"""Where the time goes: timers per stage, depths of queues, progress for people, a log.

A stage's busy time is that of one thread, or the mean of several threads that do the same work; over the seconds of the
run it gives the share of the time that the stage worked. The busiest stage is the one that the others wait for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from geoloc_batch.stream.stats import StreamStats

LINE_EVERY_S = 30.0
WINDOW_S = 60.0
STAGES: Mapping[str, tuple[str, ...]] = {
    "read": ("read",),
    "decode": ("decode",),
    "encode": ("encode",),
    "locate": ("locate",),
    "write": ("write", "commit"),
    "ledger": ("ledger",),
}
"""What may limit a run, and the timers that count for it: one thread writes and commits. Other timers are waits."""


class Telemetry:
    """Counts photos and seconds of one process; shows them and logs them.

    Args:
        log: file under `_logs/` that gets one JSON line every 30 s and one at the end; None writes none.
        total_bytes: bytes of all units, 0 where they are not known; the estimate of the time left rests on it.
        stream: where progress goes: a bar on a terminal, a line every 30 s elsewhere.
    """

    def __init__(self, log: Path | None, *, total_bytes: int = 0, stream: TextIO | None = None) -> None:
        self._log = log
        self._total_bytes = total_bytes
        self._stream = stream if stream is not None else sys.stderr
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._busy_s: dict[str, float] = {}
        self._window: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._next_line = self._started + LINE_EVERY_S
        self._bar: Any = None
        self.rows = 0
        self.errors = 0
        self.units = 0
        self.bytes_read = 0
        self.queues: dict[str, Callable[[], tuple[int, float]]] = {}
        """Queues between threads: how many things stand in each, now and on average."""
        self._stream_stats: StreamStats | None = None
        self._ended_busy_s = {"read": 0.0, "decode": 0.0}
        self._ended_bytes = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the stage `name`; stages of different threads may overlap."""
        start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy_s[name] = self._busy_s.get(name, 0.0) + time.monotonic() - start

    def count(self, *, rows: int = 0, errors: int = 0, units: int = 0) -> None:
        """Add to the counters and show progress when it is time."""
        with self._lock:
            self.rows += rows
            self.errors += errors
            self.units += units
        self._show()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def images_per_second(self) -> float:
        """Over the lifetime."""
        return self.rows / self.seconds if self.rows else 0.0

    def begin_stream(self) -> None:
        """Another stream follows those of this run that have ended: theirs is added to what it will measure."""
        with self._lock:
            self._ended_busy_s = {name: self._busy_s.get(name, 0.0) for name in self._ended_busy_s}
            self._ended_bytes = self.bytes_read

    def observe(self, stats: StreamStats) -> None:
        """Take over what the stream measured of itself so far."""
        # A thread that waits for memory waits for its fellows: it is no less at work than they are.
        decode_s = (stats.decode_busy_s + stats.memory_wait_s) / max(1, stats.decode_threads)
        with self._lock:
            self._stream_stats = stats
            self.bytes_read = self._ended_bytes + stats.bytes_read
            self._busy_s["read"] = self._ended_busy_s["read"] + stats.read_busy_s
            self._busy_s["decode"] = self._ended_busy_s["decode"] + decode_s

    def busy(self) -> dict[str, float]:
        """Share of the time that each stage worked, 0 to 1; stages that did not occur are left out."""
        seconds = max(self.seconds, 1e-9)
        return {stage: min(1.0, spent / seconds) for stage, spent in self._stages_s().items()}

    def limiting_stage(self) -> str:
        """The busiest stage, which the others wait for; "none" before anything was done."""
        busy_s = self._stages_s()
        return max(busy_s, key=lambda stage: busy_s[stage], default="none")

    def snapshot(self) -> dict[str, Any]:
        """All measurements as one JSON object."""
        with self._lock:
            timers = {name: round(value, 3) for name, value in sorted(self._busy_s.items())}
        return {
            "seconds": round(self.seconds, 3),
            "rows": self.rows,
            "errors": self.errors,
            "units": self.units,
            "images_per_second": round(self.images_per_second(), 3),
            "images_per_second_last_minute": round(self._recent_rate(), 3),
            "limiting_stage": self.limiting_stage(),
            "busy": {stage: round(share, 4) for stage, share in self.busy().items()},
            "busy_s": timers,
            "queues": self._depths(),
            "bytes_read": self.bytes_read,
            **self._stream_measurements(),
        }

    def close(self) -> None:
        """Write the last line of the log and end the bar."""
        self._write_log(final=True)
        if self._bar is not None:
            self._bar.close()

    def _stages_s(self) -> dict[str, float]:
        """Seconds that each stage worked so far."""
        with self._lock:
            busy_s = {stage: sum(self._busy_s.get(name, 0.0) for name in names) for stage, names in STAGES.items()}
        return {stage: spent for stage, spent in busy_s.items() if spent}

    def _depths(self) -> dict[str, dict[str, float]]:
        depths = {name: depth() for name, depth in self.queues.items()}
        if (stats := self._stream_stats) is not None:
            depths["photos"] = stats.samples_queued, stats.mean_samples_queued
            depths["batches"] = stats.batches_ready, stats.mean_batches_ready
        return {name: {"now": now, "mean": round(mean, 3)} for name, (now, mean) in sorted(depths.items())}

    def _stream_measurements(self) -> dict[str, Any]:
        """Everything that the stream measured, seconds rounded."""
        if self._stream_stats is None:
            return {}
        values = asdict(self._stream_stats)
        return {
            "stream": {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
        }

    def _recent_rate(self) -> float:
        now = time.monotonic()
        then, rows = self._window[0]
        return (self.rows - rows) / (now - then) if now > then else 0.0

    def _estimate(self) -> int | None:
        """Photos in all, from the bytes done so far."""
        if not self._total_bytes or not self.bytes_read or not self.rows:
            return None
        return max(self.rows, round(self.rows * self._total_bytes / self.bytes_read))

    def _show(self) -> None:
        now = time.monotonic()
        self._window.append((now, self.rows))
        while now - self._window[0][0] > WINDOW_S and len(self._window) > 2:
            self._window.popleft()
        if self._stream.isatty():
            self._show_bar()
        if now >= self._next_line:
            self._next_line = now + LINE_EVERY_S
            self._write_log(final=False)
            if not self._stream.isatty():
                print(self._line(), file=self._stream, flush=True)

    def _show_bar(self) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(unit=" photos", file=self._stream, dynamic_ncols=True)
        self._bar.total = self._estimate()
        self._bar.set_postfix_str(f"{self.errors} errors, limited by {self.limiting_stage()}", refresh=False)
        self._bar.update(self.rows - self._bar.n)

    def _line(self) -> str:
        total, rate = self._estimate(), self.images_per_second()
        left = f", {(total - self.rows) / rate:.0f} s left" if total is not None and rate else ""
        return (
            f"{self.rows} photos, {rate:.1f}/s (last minute {self._recent_rate():.1f}/s), {self.errors} errors, "
            f"limited by {self.limiting_stage()}{left}"
        )

    def _write_log(self, *, final: bool) -> None:
        if self._log is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "final": final, **self.snapshot()}) + "\n")
