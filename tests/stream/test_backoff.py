"""How long and how often a server is asked again."""

from __future__ import annotations

import random
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from stream_samples import unit_of
from stream_server import Answer, Server, assert_a_beginning, assert_whole, read

from geoloc_batch.stream import backoff as backoff_module
from geoloc_batch.stream import download as download_module
from geoloc_batch.stream import web as web_module
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.samples import UnitReader

CUT = 20_000


@pytest.mark.parametrize("is_date", [False, True])
def test_what_a_server_asks_to_wait_is_waited_up_to_a_bound(
    server: Server, monkeypatch: pytest.MonkeyPatch, is_date: bool
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Interrupt, "sleep", lambda _, seconds: waits.append(seconds))
    # By the server's clock, which may be another than ours.
    now = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)
    spans = ("7", "3600", "soon")
    if is_date:
        spans = tuple(format_datetime(now + timedelta(seconds=span), usegmt=True) for span in (7, 3600, -5))
    headers = [{"Retry-After": span, "Date": format_datetime(now, usegmt=True)} for span in spans]
    assert_whole(read(server, *(Answer(status=503, headers=told) for told in headers), Answer()))
    assert waits == pytest.approx([7, 60, 0], abs=0.05)


def test_waits_double_up_to_a_bound_and_differ_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Interrupt, "sleep", lambda _, seconds: waits.append(seconds))
    random.seed(5)
    backoff = backoff_module.Backoff(Interrupt(), max_tries=10)
    assert [backoff.wait() for _ in range(10)] == [True] * 9 + [False]
    most = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, most, strict=True))
    assert len({round(wait / bound, 6) for wait, bound in zip(waits, most, strict=True)}) == 9
    backoff.note_progress()
    assert backoff.wait()
    assert waits[-1] <= 0.5


def test_tries_end_when_their_time_is_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module, "MAX_FAILING_S", 0.4)
    started = time.monotonic()
    assert_a_beginning(read(server, Answer(stall_at=CUT)))
    assert 2 <= len(server.requests) <= 3
    assert time.monotonic() - started < 2


def test_tries_are_counted_anew_after_progress(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = [Answer(cut_at=at) for at in range(10_000, 10_000 * 10, 10_000)]
    assert_a_beginning(read(server, *cuts, Answer()))
    assert len(server.requests) == 5
    server.requests.clear()
    monkeypatch.setattr(download_module, "PROGRESS_BYTES", 20_000)
    assert_whole(read(server, *cuts, Answer()))
    assert len(server.requests) == 10


@pytest.mark.parametrize("answer", [Answer(stall_at=CUT), Answer(status=503, headers={"Retry-After": "50"})])
def test_an_interrupt_ends_the_waiting_at_once(server: Server, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 60.0)
    server.answers = [Answer(cut_at=CUT), answer]
    interrupt = Interrupt()
    reader = UnitReader(unit_of(server.url()), interrupt)
    thread = threading.Thread(target=lambda: list(reader))
    thread.start()
    while len(server.requests) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    started = time.monotonic()
    interrupt.set()
    thread.join(10)
    assert time.monotonic() - started < 1
    assert reader.unit_error is not None
    assert reader.unit_error.retryable
    assert "reading was stopped" in reader.unit_error.message
