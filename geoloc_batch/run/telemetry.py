"""Where the time goes: timers per stage, progress for people, a log for `geoloc status`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LINE_EVERY_S = 30.0
WINDOW_S = 60.0
# Stages in which a thread of the engine works; those that begin with "wait" tell who waited for whom.
WORKING = ("encode", "locate", "write", "commit", "ledger")


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
        self.stream_stage = "decode"
        self.extra: dict[str, Any] = {}
        """Further measurements for the log (threads, batches, the encoder's summary)."""

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

    def limiting_stage(self) -> str:
        """The stage that the others wait for: the engine's busiest, or, when it mostly waits, the stream's."""
        waiting = self._busy_s.get("wait", 0.0)
        busy = {name: self._busy_s[name] for name in WORKING if name in self._busy_s}
        name, most = max(busy.items(), key=lambda item: item[1], default=("none", 0.0))
        return self.stream_stage if waiting > most else name

    def snapshot(self) -> dict[str, Any]:
        """All measurements as one JSON object."""
        return {
            "seconds": round(self.seconds, 3),
            "rows": self.rows,
            "errors": self.errors,
            "units": self.units,
            "images_per_second": round(self.images_per_second(), 3),
            "images_per_second_last_minute": round(self._recent_rate(), 3),
            "limiting_stage": self.limiting_stage(),
            "busy_s": {name: round(value, 3) for name, value in sorted(self._busy_s.items())},
            "bytes_read": self.bytes_read,
            **self.extra,
        }

    def close(self) -> None:
        """Write the last line of the log and end the bar."""
        self._write_log(final=True)
        if self._bar is not None:
            self._bar.close()

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
