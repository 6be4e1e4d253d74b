"""What telemetry counts, shows and logs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from geoloc_batch.run import telemetry
from geoloc_batch.run.telemetry import Telemetry


def test_the_busiest_stage_limits_unless_the_engine_mostly_waits() -> None:
    timers = Telemetry(None, stream=io.StringIO())
    timers.stream_stage = "read"
    assert timers.limiting_stage() == "none"
    with timers.stage("encode"):
        time.sleep(0.02)
    with timers.stage("locate"):
        time.sleep(0.001)
    assert timers.limiting_stage() == "encode"
    with timers.stage("wait"):
        time.sleep(0.06)
    assert timers.limiting_stage() == "read"


def test_without_a_terminal_a_line_is_printed_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    timers = Telemetry(None, total_bytes=1000, stream=shown)
    timers.count(rows=5)
    assert shown.getvalue() == ""
    monkeypatch.setattr(telemetry, "LINE_EVERY_S", 0.0)
    timers = Telemetry(None, total_bytes=1000, stream=shown)
    timers.bytes_read = 250
    timers.count(rows=5, errors=2)
    line = shown.getvalue()
    assert line.startswith("5 photos, ")
    assert "2 errors" in line
    assert "s left" in line


def test_a_terminal_gets_a_bar_with_an_estimate_from_the_bytes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    timers = Telemetry(None, total_bytes=1000, stream=shown)
    timers.bytes_read = 250
    timers.count(rows=5)
    time.sleep(0.15)
    timers.count(rows=5)
    timers.close()
    assert "/40" in shown.getvalue()
    assert "errors, limited by" in shown.getvalue()


def test_the_log_ends_with_a_final_line(tmp_path: Path) -> None:
    log = tmp_path / "_logs" / "worker.jsonl"
    timers = Telemetry(log, stream=io.StringIO())
    timers.count(rows=3, units=1)
    timers.close()
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["final"] is True
    assert (last["rows"], last["units"]) == (3, 1)
    assert last["images_per_second"] > 0
