"""What the tests of the stream share: a scripted web server with waits that tests can afford, and no thread left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from batch_samples import threads
from stream_server import Server, running_server

from geoloc_batch.stream import backoff as backoff_module
from geoloc_batch.stream import web as web_module


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert threads() == []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(backoff_module, "FIRST_WAIT_S", 0.004)
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 0.3)
    with running_server() as server:
        yield server
