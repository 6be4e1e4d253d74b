"""What telemetry counts, shows and logs."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from geoloc_batch.run import telemetry
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.stream.stats import StreamStats


def stats_of(**fields: Any) -> StreamStats:
    """Measurements of a stream that has done nothing, save what is told."""
    zeros: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(StreamStats)}
    return StreamStats(**{**zeros, "seconds": 1.0, "decode_threads": 4, **fields})


def test_the_busiest_stage_limits_however_long_the_others_waited() -> None:
    timers = Telemetry(None, stream=io.StringIO())
    assert timers.limiting_stage() == "none"
    with timers.stage("encode"):
        time.sleep(0.02)
    with timers.stage("locate"):
        time.sleep(0.001)
    with timers.stage("wait for locate"):
        time.sleep(0.05)
    assert timers.limiting_stage() == "encode"


def test_the_stream_limits_by_what_a_thread_of_it_worked() -> None:
    timers = Telemetry(None, stream=io.StringIO())
    with timers.stage("encode"):
        time.sleep(0.02)
    timers.observe(stats_of(read_busy_s=0.001, decode_busy_s=0.04))
    assert timers.limiting_stage() == "encode"
    timers.observe(stats_of(read_busy_s=0.001, decode_busy_s=0.4))
    assert timers.limiting_stage() == "decode"
    timers.observe(stats_of(read_busy_s=0.2, decode_busy_s=0.4, bytes_read=77))
    assert timers.limiting_stage() == "read"
    assert timers.bytes_read == 77


def test_decode_threads_that_wait_for_memory_limit_too() -> None:
    timers = Telemetry(None, stream=io.StringIO())
    timers.observe(stats_of(read_busy_s=0.2, decode_busy_s=0.4, memory_wait_s=2.0))
    assert timers.limiting_stage() == "decode"


def test_writing_and_committing_are_one_threads_work() -> None:
    timers = Telemetry(None, stream=io.StringIO())
    for stage, seconds in (("encode", 0.05), ("write", 0.03), ("commit", 0.03)):
        with timers.stage(stage):
            time.sleep(seconds)
    assert timers.limiting_stage() == "write"


def test_a_stage_is_never_busier_than_all_the_time() -> None:
    timers = Telemetry(None, stream=io.StringIO())
    timers.observe(stats_of(read_busy_s=0.0, decode_busy_s=1e6))
    assert timers.busy() == {"decode": 1.0}


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


def test_the_log_tells_busy_shares_and_queues(tmp_path: Path) -> None:
    log = tmp_path / "worker.jsonl"
    timers = Telemetry(log, stream=io.StringIO())
    timers.queues["write"] = lambda: (1, 0.25)
    with timers.stage("encode"):
        time.sleep(0.05)
    with timers.stage("wait"):
        time.sleep(0.05)
    timers.observe(stats_of(read_busy_s=0.01, samples_queued=3, mean_samples_queued=1.5, mean_batches_ready=0.5))
    timers.close()
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["queues"] == {
        "batches": {"now": 0, "mean": 0.5},
        "photos": {"now": 3, "mean": 1.5},
        "write": {"now": 1, "mean": 0.25},
    }
    assert set(last["busy"]) == {"read", "encode"}
    assert last["busy"]["encode"] == pytest.approx(last["busy_s"]["encode"] / last["seconds"], abs=0.01)
    assert last["busy_s"]["wait"] >= 0.05
    assert last["stream"]["decode_threads"] == 4
