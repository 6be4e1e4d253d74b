"""A folder of compiled graphs, kept between processes and shared by ranks: one compiles, the others wait for it.

torch's compiler keeps what it made in a folder and looks there first; here that folder is chosen, one to each kind of
graph, and ranks are kept from making the same one at once, as turn.py has it. A folder in which a graph was finished
carries a mark, and nobody waits there any more.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from geoloc_batch.model.turn import never, open_lock, turn

log = logging.getLogger("geoloc_batch")

OFF = "off"
WAIT_S = 600.0
_TRIAL_BYTES = 4 << 20
_LOCK, _FINISHED = "compiling.lock", "finished.json"
_PACKAGE = __name__.partition(".")[0]


def cache_root(given: str) -> Path | None:
    """The folder that `--compile-cache` stands for.

    Args:
        given: a folder; "" for the default one, below the user's cache folder; off for none.
    """
    if given == OFF:
        return None
    if given:
        return Path(given).absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches).absolute() / "geoloc_batch" / "compile"


def graph_facts(
    tower: nn.Module, *, batch_size: int, precision: str, sdpa: str, compile_mode: str, device: torch.device
) -> dict[str, str]:
    """What a compiled graph depends on. Where all of it is equal, a process finds what another one compiled."""
    shapes = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in tower.state_dict().items()]
    settings = [
        (
            name,
            type(module).__name__,
            {key: value for key, value in vars(module).items() if isinstance(value, int | float)},
        )
        for name, module in tower.named_modules()
    ]
    # Edited code makes another graph: of every file that has a part of the tower.
    ours = {type(module).__module__ for module in tower.modules()}
    sources = [inspect.getsource(sys.modules[name]) for name in sorted(ours) if name.partition(".")[0] == _PACKAGE]
    code = f"{shapes}{settings}{sources}"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "torch": torch.__version__,
        "triton": triton,
        "device": _device_facts(device),
        "architecture": hashlib.sha256(code.encode()).hexdigest()[:16],
        "batch_size": str(batch_size),
        "precision": precision,
        "sdpa": sdpa,
        "compile_mode": compile_mode,
    }


def _device_facts(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    # Loops are compiled for the processor's vectors and for a number of threads.
    features = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    return f"{platform.machine()} {torch.get_num_threads()} threads {' '.join(features)}"


def graph_folder(root: Path, facts: Mapping[str, str]) -> Path:
    """The folder of one kind of graph below `root`; finished.json in it says in words what it is for."""
    return root / hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:24]


def is_finished(folder: Path) -> bool:
    """Whether the graph of this folder was compiled once, by anybody."""
    return (folder / _FINISHED).exists()


@contextmanager
def compiling(
    folder: Path, facts: Mapping[str, str], *, wait_s: float = WAIT_S, is_stopped: Callable[[], bool] = never
) -> Iterator[None]:
    """The first call of a compiled module belongs inside: it starts from the folder, or fills it.

    Args:
        folder: see graph_folder; made where it is absent. One that cannot be written is warned of, and left alone.
        facts: written into it, for people.
        wait_s: seconds to wait for another process that compiles the same; then this one compiles too.
        is_stopped: asked while it waits.

    Raises:
        StopRequested: a stop was asked for while it waited.
    """
    if not _is_usable(folder):
        yield
        return
    waiting = turn(
        folder / _LOCK,
        lambda: is_finished(folder),
        work=f"compiling in {folder}",
        wait_s=wait_s,
        is_stopped=is_stopped,
    )
    with waiting, _inductor_cache(folder):
        yield
        _mark(folder, facts)


def _is_usable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            # A quota that is used up shows where bytes are written, and would end the compiler halfway.
            trial.write(bytes(_TRIAL_BYTES))
            trial.flush()
            os.fsync(trial.fileno())
        # Made by another user, it may be there and closed to us.
        os.close(open_lock(folder / _LOCK))
    except OSError as error:
        log.warning(
            "--compile-cache %s cannot be used (%s): this process compiles for itself; name a folder that can be "
            "written, or off",
            folder.parent,
            error.strerror or error,
        )
        return False
    return True


@contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    """Lead torch's compiler and Triton to a folder; they look at the environment whenever they compile."""
    wanted = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _mark(folder: Path, facts: Mapping[str, str]) -> None:
    if is_finished(folder):
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as scratch:
            json.dump(dict(facts), scratch, indent=1)
        os.replace(scratch.name, folder / _FINISHED)
    except OSError as error:
        log.warning("%s cannot be marked as finished: %s", folder, error.strerror or error)
