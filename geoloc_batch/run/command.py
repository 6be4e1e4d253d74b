"""The command that made an OUT, kept in its logs, so that `geoloc retry OUT` needs no flags.

`_logs/command.json` holds the settings of the latest `embed` or `predict`. What decides the rows is pinned elsewhere
(run.json) and compared again; this file says where to find it: the checkpoint, the head, the cells.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geoloc_batch.errors import OutputError
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.heads import published
from geoloc_batch.run.config import EmbedConfig, PredictConfig, RunConfig
from geoloc_batch.stream.config import StreamConfig

COMMAND_FILE = "command.json"
_PARTS = {"run": RunConfig, "encoder": EncoderConfig, "stream": StreamConfig, "locate": LocateConfig}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command as it was given, the paths of its encoder, heads, cells and embeddings absolute."""

    config: EmbedConfig | PredictConfig
    inputs: tuple[str, ...] = ()
    """What the shards were packed from, where that was done on the fly."""


def record_command(out: Path, config: EmbedConfig | PredictConfig, inputs: Sequence[str] = ()) -> None:
    """Keep a command in OUT's logs. Ranks that write it at once write the same."""
    text = json.dumps(
        {
            "command": "embed" if isinstance(config, EmbedConfig) else "predict",
            "folder": os.getcwd(),
            "inputs": list(inputs),
            "config": asdict(_anchored(config)),
        },
        indent=1,
    )
    path = out / "_logs" / COMMAND_FILE
    # No number of a process: ranks in containers may all have the same.
    scratch = path.with_name(f"{COMMAND_FILE}.{os.urandom(8).hex()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def read_command(out: Path) -> Command:
    """The command that OUT was made with, or gone on with, last.

    Raises:
        OutputError: there is none, or it was written by another version.
    """
    path = out / "_logs" / COMMAND_FILE
    try:
        fields = json.loads(path.read_bytes())
        kind = {"embed": EmbedConfig, "predict": PredictConfig}[fields["command"]]
        parts = {name: _part(name, value) for name, value in fields["config"].items()}
        return Command(config=kind(**{**parts, "out": str(out)}), inputs=tuple(fields["inputs"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"{path}, which says how {out} was made, cannot be read ({error}); run the command that made it once "
            f"more, which writes it again"
        ) from error


def _part(name: str, value: Any) -> Any:
    if name in _PARTS:
        return _PARTS[name](**{key: _frozen(member) for key, member in value.items()})
    return _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _anchored(config: EmbedConfig | PredictConfig) -> EmbedConfig | PredictConfig:
    """The same settings, their paths good from any folder."""
    encoder = config.encoder
    cache = encoder.compile_cache
    encoder = dataclasses.replace(
        encoder,
        encoder=_encoder_path(encoder.encoder),
        compile_cache=cache if cache in ("", "off") else _absolute(cache),
    )
    if isinstance(config, EmbedConfig):
        return dataclasses.replace(config, encoder=encoder)
    locate = dataclasses.replace(
        config.locate,
        head=tuple(map(_head_path, config.locate.head)),
        cells=tuple(map(_existing, config.locate.cells)),
    )
    stored = config.from_embeddings and _absolute(config.from_embeddings)
    return dataclasses.replace(config, encoder=encoder, locate=locate, from_embeddings=stored)


def _encoder_path(given: str) -> str:
    """A folder's path, or that of the file in open_clip:ARCH:FILE; names stay names, whatever lies beside them."""
    if given.startswith("open_clip:"):
        scheme, arch, *rest = given.split(":", 2)
        return ":".join([scheme, arch, *map(_existing, rest)])
    return given if given == "demo" else _existing(given)


def _head_path(given: str) -> str:
    """A file's path; short names stay names, whatever lies beside them."""
    name, equals, rest = given.partition("=")
    if published(given) or (equals and published(rest)):
        return given
    return f"{name}={_existing(rest)}" if equals and os.path.exists(rest) else _existing(given)


def _existing(given: str) -> str:
    """Absolute where it is a path; hf: and hub ids as they are."""
    return _absolute(given) if os.path.exists(os.path.expanduser(given)) else given


def _absolute(given: str) -> str:
    return os.path.abspath(os.path.expanduser(given))
