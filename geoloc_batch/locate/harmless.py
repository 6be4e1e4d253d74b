"""Types that training scripts leave in a checkpoint beside the tensors, and what stands in for them on loading."""

from __future__ import annotations

from typing import Any


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
