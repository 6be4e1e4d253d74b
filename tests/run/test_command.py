"""The record of the command that made an OUT, where many ranks write it at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.run.command import read_command, record_command
from geoloc_batch.run.config import EmbedConfig


def test_ranks_that_count_alike_in_their_containers_record_the_command_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EmbedConfig(shards=("a.tar",), out=str(tmp_path), encoder=EncoderConfig(encoder="demo"))
    (tmp_path / "_logs").mkdir()
    monkeypatch.setattr(os, "getpid", lambda: 2)
    replace, is_first = Path.replace, [True]

    def replace_beside_another(source: Path, target: Path) -> Path:
        if is_first and is_first.pop():
            record_command(tmp_path, config)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", replace_beside_another)
    record_command(tmp_path, config)

    assert read_command(tmp_path).config == config
    assert [path.name for path in (tmp_path / "_logs").iterdir()] == ["command.json"]
