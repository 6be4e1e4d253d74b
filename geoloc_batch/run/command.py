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
from geoloc_batch.run.config import EmbedConfig, PredictConfig, RunConfig
from geoloc_batch.stream.config import StreamConfig

COMMAND_FILE = "command.json"
_PARTS = {"run": RunConfig, "encoder": EncoderConfig, "stream": StreamConfig, "locate": LocateConfig}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command as it was given."""

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
            "config": asdict(config),
        },
        indent=1,
    )
    path = out / "_logs" / COMMAND_FILE
    scratch = path.with_name(f"{COMMAND_FILE}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def read_command(out: Path) -> Command:
    """The command that OUT was last worked on with, its paths as seen from here.

    Raises:
        OutputError: there is none, or it was written by another version.
    """
    path = out / "_logs" / COMMAND_FILE
    try:
        fields = json.loads(path.read_bytes())
        folder = Path(fields["folder"])
        kind = {"embed": EmbedConfig, "predict": PredictConfig}[fields["command"]]
        parts = {name: _part(name, value, folder) for name, value in fields["config"].items()}
        return Command(config=kind(**{**parts, "out": str(out)}), inputs=tuple(fields["inputs"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path}, which says how {out} was made, cannot be read ({error}); run the command that made it once "
            f"more, which writes it again"
        ) from error


def _part(name: str, value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if name == "from_embeddings" and value:
        return _found_again(value, folder)
    if name not in _PARTS:
        return value
    part = _PARTS[name](**{key: tuple(member) if isinstance(member, list) else member for key, member in value.items()})
    if isinstance(part, EncoderConfig):
        return dataclasses.replace(part, encoder=_found_again(part.encoder, folder))
    if isinstance(part, LocateConfig):
        heads = tuple(_found_again(head, folder) for head in part.head)
        return dataclasses.replace(part, head=heads, cells=tuple(_found_again(cells, folder) for cells in part.cells))
    return part


def _found_again(given: str, folder: Path) -> str:
    """A path that was given in `folder`, absolute; whatever is no path there as it is."""
    name, equals, rest = given.partition("=")
    if equals and (folder / rest).exists():
        return f"{name}={folder / rest}"
    return str(folder / given) if (folder / given).exists() else given
