"""The first rank of a run: it finds what the settings leave open and pins it, the others wait for that and adopt it.

Finding it means to try batches out and to time backends, on CUDA. Ranks that start together on one OUT do so in turns
(model/turn.py), so that one of them does it. The turn ends when run.json stands, or with its holder's life. It saves
work alone: run.json is what decides, whoever comes second there adopts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from geoloc_batch.errors import OutputError
from geoloc_batch.model.choice import is_measured
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.turn import turn
from geoloc_batch.run.encoders import adopt_settings, left_open
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.pin import RUN_FILE, parse_run, prepare_folder
from geoloc_batch.store.publish import read_published

log = logging.getLogger("geoloc_batch")

WAIT_S = 300.0
_MEASURED = {"batch_size", "sdpa"}
_LOCK = "first_rank.lock"


@contextmanager
def agreed(
    config: EncoderConfig, out: Path, device: torch.device, is_stopped: Callable[[], bool], *, wait_s: float = WAIT_S
) -> Iterator[EncoderConfig]:
    """The settings to load an encoder by: with what is pinned, if anything is. The ledger is to be opened inside.

    Args:
        config: the user's.
        out: the run's folder.
        device: where the encoder will be.
        is_stopped: asked while another rank is waited for.
        wait_s: seconds to wait for it; then this rank finds for itself.

    Raises:
        OutputError: OUT cannot be used, is none of ours, or pins a setting to what no run pins.
        StopRequested: a stop was asked for while it waited.
    """
    pinned = _pinned(out)
    if pinned is None and is_measured(device) and _MEASURED.intersection(left_open(config)):
        prepare_folder(OsFiles(), out)
        lock = out / "_logs" / _LOCK
        what = f"finding the batch size and the fastest attention for {out}"
        with ExitStack() as stack:
            try:
                stack.enter_context(
                    turn(lock, lambda: _pinned(out) is not None, work=what, wait_s=wait_s, is_stopped=is_stopped)
                )
            except OSError as error:
                log.info("%s cannot be opened (%s): this process is %s for itself", lock, error.strerror, what)
            yield _adopted(config, out, _pinned(out))
    else:
        yield _adopted(config, out, pinned)


def _pinned(out: Path) -> Mapping[str, Any] | None:
    try:
        data = read_published(out / RUN_FILE)
    except NotADirectoryError:
        # The ledger has words for it.
        return None
    return None if data is None else parse_run(out / RUN_FILE, data)


def _adopted(config: EncoderConfig, out: Path, pinned: Mapping[str, Any] | None) -> EncoderConfig:
    if pinned is None:
        return config
    adopted = {name: pinned[name] for name in left_open(config) if name in pinned}
    for name, value in adopted.items():
        _check_value(out / RUN_FILE, name, value)
    if adopted:
        log.info("adopting what the first rank pinned: %s", adopted)
    return adopt_settings(config, pinned)


def _check_value(path: Path, name: str, value: Any) -> None:
    """Raise OutputError for what no run pins: somebody has changed the file."""
    if name == "batch_size":
        is_ours, wanted = type(value) is int and value > 0, "a whole number above 0"
    elif name == "compile":
        is_ours, wanted = isinstance(value, bool), "true or false"
    else:
        names = [choice for choice in get_args(get_type_hints(EncoderConfig)[name]) if choice != "auto"]
        is_ours, wanted = value in names, f"one of {', '.join(names)}"
    if not is_ours:
        raise OutputError(
            f"{path} pins {name} to {json.dumps(value)}, which no run does: it is {wanted}; put back what stood there, "
            "or give another --out"
        )
