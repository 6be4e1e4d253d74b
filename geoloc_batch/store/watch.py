"""Watch: a run's status, once or again and again until all is done."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from typing import TextIO

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_INCOMPLETE
from geoloc_batch.store.config import StatusConfig
from geoloc_batch.store.status import Looker, Status
from geoloc_batch.store.status_text import MAX_RANKS, format_line, format_status

# Cursor to the upper left corner, and everything behind it away.
CLEAR = "\x1b[H\x1b[J"


def show_status(config: StatusConfig, stream: TextIO | None = None) -> int:
    """Print what the settings ask for; the last line is one JSON object.

    Returns:
        The exit code: 0, or 75 where somebody ends the watch before the run is complete.

    Raises:
        OutputError: the folder is none of ours, or broken.
    """
    stream = stream if stream is not None else sys.stdout
    looker = Looker(config.out)
    if config.watch is None:
        found = looker.look()
        if not config.json:
            print(format_status(found), file=stream)
        _print_json(found if config.json else _shown(found), stream)
        return EXIT_COMPLETE
    found = _watch(looker, config.watch, stream, is_json=config.json)
    if not config.json:
        _print_json(_shown(found), stream)
    return EXIT_COMPLETE if found.state == "complete" else EXIT_INCOMPLETE


def _watch(looker: Looker, every_s: float, stream: TextIO, *, is_json: bool) -> Status:
    """Look until the run is complete, or Ctrl-C; the last look."""
    found = looker.look()
    try:
        while True:
            if is_json:
                _print_json(found, stream)
            elif stream.isatty():
                print(f"{CLEAR}{format_status(found)}\n  {time.strftime('%H:%M:%S')}", file=stream, flush=True)
            else:
                print(f"{time.strftime('%H:%M:%S')} {format_line(found)}", file=stream, flush=True)
            if found.state == "complete":
                return found
            time.sleep(every_s)
            found = looker.look()
    except KeyboardInterrupt:
        return found


def _shown(found: Status) -> Status:
    """With the ranks that stand in the lines above: those of a thousand others would bury these."""
    return replace(found, ranks=found.ranks[:MAX_RANKS])


def _print_json(found: Status, stream: TextIO) -> None:
    print(json.dumps(asdict(found)), file=stream, flush=True)
