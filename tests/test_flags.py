"""Flat flags, TOML files and nested settings."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from geoloc_batch import cli
from geoloc_batch.errors import ConfigError
from geoloc_batch.flags import flag_names, from_flat
from geoloc_batch.run.config import EmbedConfig, PredictConfig
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.train.config import TrainConfig


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[PredictConfig]:
    """`geoloc predict` only notes what it was asked to do."""
    seen: list[PredictConfig] = []

    def note(config: PredictConfig) -> int:
        seen.append(config)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "predict", (PredictConfig, note))
    return seen


def toml(tmp_path: Path, text: str) -> str:
    (tmp_path / "run.toml").write_text(text)
    return str(tmp_path / "run.toml")


def test_flags_of_nested_settings_stand_flat() -> None:
    config = from_flat(EmbedConfig, {"shards": ["a.tar"], "out": Path("x"), "decode-threads": 3, "precision": "fp32"})
    assert config.shards == ("a.tar",)
    assert config.out == "x"
    assert config.stream.decode_threads == 3
    assert config.encoder.precision == "fp32"


@pytest.mark.parametrize(("name", "alone"), [("seed", 3), ("lam", 0.01), ("loss", "ce"), ("cells", Path("c.json"))])
def test_a_lone_value_stands_for_a_list_of_one(name: str, alone: object) -> None:
    config = from_flat(TrainConfig, {"embeddings": "emb", "cells": "c.json", "out": "x", name: alone})
    assert getattr(config, name) == (str(alone) if isinstance(alone, Path) else alone,)


def test_no_flag_of_a_command_is_named_twice() -> None:
    for kind, _ in cli.COMMANDS.values():
        flat = list(flag_names(kind))
        assert len(flat) == len(set(flat))


def test_a_toml_file_gives_flags_and_the_command_line_wins(tmp_path: Path, parsed: list[PredictConfig]) -> None:
    path = toml(tmp_path, 'out = "pred"\ntop-k = 7\nhead = ["a.pt", "b.pt"]\nprecision = "fp32"\nlimit = 5\n')
    assert cli.main(["predict", "x.tar", "--config", path, "--head", "z.pt", "--limit", "9"]) == 0
    assert cli.main(["predict", "x.tar", f"--config={path}"]) == 0
    flags_won, as_written = parsed
    assert (flags_won.locate.head, flags_won.run.limit) == (("z.pt",), 9)
    assert (as_written.locate.head, as_written.run.limit) == (("a.pt", "b.pt"), 5)
    for config in parsed:
        assert (config.out, config.locate.top_k, config.encoder.precision) == ("pred", 7, "fp32")


def test_shards_may_stand_in_the_toml_file(tmp_path: Path, parsed: list[PredictConfig]) -> None:
    path = toml(tmp_path, 'shards = ["a.tar", "b.tar"]\nout = "pred"\n')
    assert cli.main(["predict", "--config", path]) == 0
    assert parsed[0].shards == ("a.tar", "b.tar")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("topk = 3\n", ["'topk'", "did you mean top_k?"]),
        ("zzz = 3\n", ["'zzz'", "known are"]),
        ("top_k = 'many'\n", ["top_k", "int", "'many'"]),
        ("top_k = true\n", ["top_k", "int", "True"]),
        ("precision = 'fp7'\n", ["precision", "fp32", "'fp7'"]),
        ("batch_size = 'many'\n", ["batch_size", "type int", "one of auto", "'many'"]),
        ("head = 3\n", ["head", "type str", "3"]),
        ("limit = [", ["is not TOML"]),
    ],
)
def test_a_wrong_toml_file_is_named_with_the_remedy(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toml(tmp_path, text)
    assert cli.main(["predict", "x.tar", "--config", path]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in [path, *words]), message


def test_an_absent_toml_file_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "x.tar", "--config", "absent.toml"]) == 2
    assert "absent.toml" in capsys.readouterr().err
    assert cli.main(["predict", "x.tar", "--config"]) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"shards": ["a.tar"]}, "out must be given"),
        ({"shards": ["a.tar"], "out": "x", "limit": 0}, "--limit must be at least 1, got 0"),
        ({"shards": ["a.tar"], "out": "x", "max_error_rate": 2}, "--max-error-rate must lie between 0 and 1, got 2"),
        ({"shards": [], "out": "x"}, "no shards were given"),
        ({"shards": ["a.tar"], "out": "x", "batch_size": -1}, "--batch-size"),
    ],
)
def test_python_callers_read_the_words_of_the_command_line(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_flat(EmbedConfig, flags)
    assert words in str(error.value)


@pytest.mark.parametrize(("given", "fixed"), [("auto", None), (0, None), (96, 96)])
def test_a_batch_size_is_a_number_or_auto_from_python_toml_and_the_command_line(
    given: int | str, fixed: int | None, tmp_path: Path, parsed: list[Any]
) -> None:
    flags = {"shards": ["a.tar"], "out": "x", "batch_size": given}
    assert from_flat(EmbedConfig, flags).encoder.given_batch_size == fixed
    written = toml(tmp_path, f"batch_size = {given!r}\n")
    assert cli.main(["predict", "a.tar", "--out", "x", "--config", written]) == 0
    assert cli.main(["predict", "a.tar", "--out", "x", "--batch-size", str(given)]) == 0
    assert [config.encoder.given_batch_size for config in parsed] == [fixed, fixed]


def test_heads_and_cells_must_pair() -> None:
    flags = {"shards": ["a.tar"], "out": "x", "head": ["a", "b", "c"], "cells": ["d", "e"]}
    with pytest.raises(ConfigError, match="2 times for 3 --head"):
        from_flat(PredictConfig, flags)


def test_every_flag_has_its_docstring_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command, (kind, _) in cli.COMMANDS.items():
        if any(other.startswith(f"{command} ") for other in cli.COMMANDS):
            # Its help is its group's, which has no place for flags.
            assert not flag_names(kind), command
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for flag in flag_names(kind):
            positional = flag.upper() in text
            assert positional or f"--{flag.replace('_', '-')}" in text, f"{command}: {flag}"


def test_help_breaks_lines_only_where_they_are_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, (kind, _) in cli.COMMANDS.items():
        if not flag_names(kind):
            continue
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        text = capsys.readouterr().out
        assert "(default: )" not in text
        assert "(default: '')" not in text
        lines = text.replace("│", " ").splitlines()
        column = next(line.index("show this help") for line in lines if line.strip().startswith("-h"))
        for line, following in itertools.pairwise(lines):
            if line.strip() and following.strip() and not (line[:column] + following[:column]).strip():
                word = following.split()[0]
                # A box takes two columns of the 80.
                assert len(line.rstrip()) + 1 + len(word) >= 78, f"{command}: {line.strip()} | {word}"


def test_a_warning_of_the_hubs_library_is_printed_once() -> None:
    code = (
        "from geoloc_batch.cli import main; main(['--version']); import huggingface_hub.utils.logging as hub;"
        "hub.get_logger('huggingface_hub.file_download').warning('no answer')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["no answer"]


@pytest.mark.parametrize("given", ["~/x", "./~", "~"])
def test_a_leading_tilde_of_out_is_the_home(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shell expands that of `--out ~/x`, and not that of `--out=~/x`.
    monkeypatch.setenv("HOME", "/home/me")
    expected = {"~/x": "/home/me/x", "./~": "./~", "~": "/home/me"}[given]
    assert from_flat(EmbedConfig, {"shards": ["a.tar"], "out": given}).out == expected
    assert from_flat(PredictConfig, {"shards": ["a.tar"], "out": given}).out == expected
    assert from_flat(PackConfig, {"sources": ["a"], "out": given}).out == expected


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
