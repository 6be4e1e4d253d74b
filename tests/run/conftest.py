"""What the end-to-end tests share: one small world a session, and the command in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from small_world import COUNTS, World, make_checkpoint, make_head, make_shards

from geoloc_batch.cli import main


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    make_shards(root / "shards", COUNTS)
    head, cells = make_head(root / "head")
    return World(root, make_checkpoint(root / "checkpoint"), head, cells, root / "shards")


@pytest.fixture
def geoloc(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command in this process; gives the exit code and the JSON of the last line on stdout."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        lines = capsys.readouterr().out.splitlines()
        return code, json.loads(lines[-1])

    return run
