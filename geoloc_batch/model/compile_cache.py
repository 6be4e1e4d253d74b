"""A folder of compiled graphs, kept between processes and shared by ranks: one compiles, the others wait for it.

torch's compiler keeps what it made in a folder and looks there first; here that folder is chosen, one to each kind of
graph, and ranks are kept from making the same one at once. Whoever compiles holds a lock of the operating system on
it, which falls when its process dies. A folder in which a graph was finished carries a mark, and nobody waits there
any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger("geoloc_batch")

OFF = "off"
WAIT_S = 600.0
_POLL_S = 0.2
_TRIAL_BYTES = 4 << 20
_LOCK, _FINISHED = "compiling.lock", "finished.json"


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


def graph_facts(tower: nn.Module, *, batch_size: int, precision: str, device: torch.device) -> dict[str, str]:
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
    # Edited code makes another graph.
    code = f"{shapes}{settings}{inspect.getsource(inspect.getmodule(type(tower)) or type(tower))}"
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
def compiling(folder: Path, facts: Mapping[str, str], *, wait_s: float = WAIT_S) -> Iterator[None]:
    """The first call of a compiled module belongs inside: it starts from the folder, or fills it.

    Args:
        folder: see graph_folder; made where it is absent. One that cannot be written is warned of, and left alone.
        facts: written into it, for people.
        wait_s: seconds to wait for another process that compiles the same; then this one compiles too.
    """
    if not _is_usable(folder):
        yield
        return
    with _turn(folder, wait_s), _inductor_cache(folder):
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
        os.close(_open_lock(folder))
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
def _turn(folder: Path, wait_s: float) -> Iterator[None]:
    """Nobody else compiles inside, unless the graph is finished, locks are missing or the wait was too long."""
    if is_finished(folder):
        yield
        return
    descriptor = _open_lock(folder)
    try:
        started, is_told = time.monotonic(), False
        while not _locked(descriptor, folder):
            if is_finished(folder):
                break
            if time.monotonic() - started > wait_s:
                log.warning("another process has been compiling in %s for %.0f s: not waiting longer", folder, wait_s)
                break
            if not is_told:
                log.info("waiting for another process that compiles the same encoder in %s", folder)
                is_told = True
            time.sleep(_POLL_S)
        yield
    finally:
        # Gives the lock back, as the end of the process does, whatever ends it.
        os.close(descriptor)


def _open_lock(folder: Path) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _locked(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.info("%s has no locks (%s): every process compiles for itself", folder, error.strerror)
    return True


@contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    """Lead torch's compiler and Triton to a folder; they look at the environment whenever they compile."""
    import torch._inductor.config as inductor

    wanted = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with inductor.patch(fx_graph_cache=True):
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
