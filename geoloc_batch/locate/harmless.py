"""Pickles that torch.save wrote: loaded without executing them, or, where they are trusted, with.

Training scripts leave things in a checkpoint beside the tensors. Harmless types are known, and stood in for on loading.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from geoloc_batch.errors import HeadError

log = logging.getLogger(__name__)


class Unread:
    """Stands in for a value that nothing here reads: a Namespace, a path, whatever numpy wrote.

    The real types are not built. numpy's would not even be safe: a doctored dtype turns raw bytes into an array of
    Python objects, that is, of pointers.
    """

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _dict_without_default(factory: object = None) -> dict[Any, Any]:
    """Stands in for collections.defaultdict, which torch's unpickler knows but does not fill."""
    return {}


# numpy's functions and pathlib's classes moved between versions: a file may name them by either module.
_UNREAD = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
)
# What a defaultdict calls for a missing key is written by name.
_FACTORIES = (list, dict, tuple, int, float, bool, str)

HARMLESS_TYPES: list[Any] = [
    *((Unread, name) for name in _UNREAD),
    *((factory, f"builtins.{factory.__name__}") for factory in _FACTORIES),
    (_dict_without_default, "collections.defaultdict"),
]
"""For torch.serialization.safe_globals: argparse.Namespace, paths, defaultdict, numpy's scalars, arrays and dtypes."""


def load_pickle(data: bytes, path: Path, *, trust: bool = False) -> object:
    """What torch.save wrote, on the CPU.

    Args:
        data: the file's bytes.
        path: the file, for messages.
        trust: execute it, with all that this user may do, where it cannot be loaded without.

    Raises:
        HeadError: it is broken, or holds a type that is not known to be harmless and is not trusted.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS_TYPES):
            # torch warns of pickles that it then refuses, and the refusal below says all of it.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A pickle is a program in a small language: a broken one can fail in any way.
    except Exception as error:
        if trust:
            return _executed(data, path)
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise HeadError(
                f"{path} holds {refused.group(1)}, a type that is not known to be harmless; nothing of the file was "
                "executed. Save the weights alone, torch.save({'model': model.state_dict()}, 'best.pt'), or ask its "
                "author for safetensors; `geoloc heads convert FILE NEW.safetensors --trust` executes it: only where "
                "you trust who made it"
            ) from None
        raise HeadError(f"{path} is no whole PyTorch checkpoint ({_reason(error)}); {copy_again(path)}") from None


def copy_again(path: Path) -> str:
    """What helps where a file is broken."""
    if any(part.startswith("models--") for part in path.parts):
        # The name in the hub's cache is a link: without its target the hub library loads the file anew.
        return f"it lies in the hub's cache: remove {path.resolve()}, then run the same command again"
    return "fetch or copy the file again"


def _executed(data: bytes, path: Path) -> object:
    """What a pickle makes when it is executed."""
    log.warning("--trust: EXECUTING the code in %s, with all that this user may do", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:
        raise HeadError(f"{path} cannot be loaded even when it is trusted: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What torch says is wrong, in one line. Its preface, which tells how to load a pickle unsafely, is left out."""
    words = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    # A sentence ends before white space: names with dots in them stay whole.
    first = re.split(r"\.\s|\n", words, maxsplit=1)[0]
    return first[:200] or type(error).__name__
