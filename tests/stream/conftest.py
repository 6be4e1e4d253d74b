"""A scripted web server, with waits that tests can afford."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stream_server import Server, running_server

from geoloc_batch.stream import backoff as backoff_module
from geoloc_batch.stream import web as web_module


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(backoff_module, "FIRST_WAIT_S", 0.004)
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 0.3)
    with running_server() as server:
        yield server
