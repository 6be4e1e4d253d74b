"""Heads on disk: the published best.pt, a bare state dict, safetensors. Nothing in a file is ever executed.

Shape letters: D features, C cells.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.locate.harmless import HARMLESS_TYPES

TENSORS = ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
"""LayerNorm's scale and shift, the linear layer's weight and bias. Position 1 is the dropout, which has no weights."""

# What training with several devices or torch.compile puts before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_REMARKS = ("tap", "encoder_sha256", "partition_fingerprint")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Head:
    """LayerNorm and Linear: D features to C cells."""

    path: str
    """The file it came from."""
    sha256: str
    """Of the file's bytes."""
    norm_weight: Tensor
    """[D] LayerNorm's scale; this and the next three are float32 on the CPU."""
    norm_bias: Tensor
    """[D] LayerNorm's shift."""
    weight: Tensor
    """[C, D] the linear layer's weight."""
    bias: Tensor
    """[C] its bias."""
    tap: str = "pooled"
    """The features it takes. A file that says nothing takes pooled ones, as the published heads do."""
    encoder_sha256: str | None = None
    """The encoder it was trained on, where the file says."""
    partition_fingerprint: str | None = None
    """The partition it was trained on, where the file says."""

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    @property
    def num_cells(self) -> int:
        """C."""
        return self.weight.shape[0]


def read_head(path: str | Path) -> Head:
    """Read a head's file; all sizes come from it.

    Args:
        path: a best.pt ({"model": {"head.0.weight", ...}, ...}) or a bare state dict as torch.save writes them, or
            a .safetensors file with the same names. Tap, encoder_sha256 and partition_fingerprint are looked for in
            the file (safetensors' metadata, best.pt's "head"), then in a head.json beside it.

    Raises:
        HeadError: the file is missing, broken, holds a type that is not known to be harmless, or is no head.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise HeadError(f"no such head: {path}; give a best.pt or .safetensors file with --head") from None
    except OSError as error:
        raise HeadError(f"the head {path} cannot be read: {error}") from error
    remarks = _read_remarks(path.with_name("head.json"))
    if path.suffix == ".safetensors":
        state, metadata = _from_safetensors(data, path)
        remarks |= _remarks(metadata, f"{path}: metadata")
    else:
        state, written = _from_checkpoint(data, path)
        remarks |= _remarks(written, f"{path}: head")
    tensors = _checked(state, path)
    return Head(
        path=str(path),
        sha256=hashlib.sha256(data).hexdigest(),
        norm_weight=tensors["head.0.weight"],
        norm_bias=tensors["head.0.bias"],
        weight=tensors["head.2.weight"],
        bias=tensors["head.2.bias"],
        tap=remarks.get("tap", "pooled"),
        encoder_sha256=remarks.get("encoder_sha256"),
        partition_fingerprint=remarks.get("partition_fingerprint"),
    )


def save_head(path: str | Path, state: Mapping[str, Tensor], *, remarks: Mapping[str, str] | None = None) -> None:
    """Write a head as the published ones are, or as safetensors if the path ends so.

    Args:
        path: best.pt or NAME.safetensors; its folder must exist.
        state: the four tensors named in TENSORS.
        remarks: tap, encoder_sha256 and partition_fingerprint, where known: safetensors keeps them as its metadata,
            best.pt under "head".
    """
    tensors = {name: state[name].detach().cpu().float().contiguous() for name in TENSORS}
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, str(path), metadata=dict(remarks or {}))
    else:
        torch.save({"model": tensors, "head": dict(remarks or {})}, path)


def _from_safetensors(data: bytes, path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise HeadError(f"{path} is no whole safetensors file: {error}") from error
    # The file begins with its header's length and the header, which `load` has checked.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _from_checkpoint(data: bytes, path: Path) -> tuple[Mapping[str, Any], object]:
    """The model's entries, and what `save_head` noted beside them."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS_TYPES):
            # torch warns of pickles that it then refuses, and the refusal below says all of it.
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A pickle is a program in a small language: a broken one can fail in any way.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise HeadError(
                f"{path} holds {refused.group(1)}, a type that is not known to be harmless; nothing of the file was "
                "executed. Save the weights alone, torch.save({'model': model.state_dict()}, 'best.pt'), where you "
                "trust the file, or ask its author for safetensors"
            ) from None
        raise HeadError(
            f"{path} is no whole PyTorch checkpoint ({_reason(error)}); fetch or copy the file again"
        ) from None
    model = loaded.get("model", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(model, Mapping):
        raise HeadError(f"{path} holds a {type(model).__name__} where a head's tensors by name should be")
    written = loaded.get("head") if model is not loaded else None
    # Only `save_head` writes a mapping there; what others keep under that name is theirs.
    return cast("Mapping[str, Any]", model), written if isinstance(written, Mapping) else {}


def _checked(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The four tensors in float32, after a look at names, shapes and values."""
    names = [_unwrapped(name) for name in state]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise HeadError(f"{path} holds {twice} twice, with and without a wrapper's prefix; keep one of them")
    state = dict(zip(names, state.values(), strict=True))
    missing = [name for name in TENSORS if name not in state]
    layers = [name for name in state if name.startswith("head.") and name not in TENSORS]
    if missing or layers:
        found = ", ".join(sorted(state)[:8]) or "nothing"
        raise HeadError(
            f"{path} is no LayerNorm and Linear head: under 'head.' it needs exactly {', '.join(TENSORS)}; "
            f"found {found}"
        )
    strangers = sorted(name for name in state if name not in TENSORS)
    if strangers:
        log.warning("%s: %d tensors beside the head are not used: %s", path, len(strangers), ", ".join(strangers[:8]))
    for name in TENSORS:
        if not _is_plain(state[name]):
            raise HeadError(f"{path}: {name} is no floating-point tensor")
    tensors = {name: state[name].detach().float().contiguous() for name in TENSORS}
    weight = tensors["head.2.weight"]
    num_cells, dim = weight.shape if weight.ndim == 2 else (0, 0)
    expected = {"head.0.weight": (dim,), "head.0.bias": (dim,), "head.2.bias": (num_cells,)}
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if not num_cells or not dim or wrong:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in TENSORS)
        raise HeadError(f"{path}: the head's tensors do not fit together: {shapes}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise HeadError(f"{path}: {name} holds NaN or infinite values")
    return tensors


def _is_plain(value: object) -> bool:
    """Whether it is a dense tensor of floats that has values."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return False
    return value.is_floating_point()


def _unwrapped(name: object) -> str:
    bare = str(name)
    while bare.startswith(_WRAPPERS):
        bare = bare.split(".", 1)[1]
    return bare


def _read_remarks(path: Path) -> dict[str, str]:
    """Tap, encoder and partition from a head.json; empty where there is none."""
    try:
        remarks = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HeadError(f"{path} cannot be read: {error}") from error
    return _remarks(remarks, str(path))


def _remarks(remarks: object, source: str) -> dict[str, str]:
    if not isinstance(remarks, Mapping):
        raise HeadError(f"{source} must hold names and values, not a {type(remarks).__name__}")
    for name in _REMARKS:
        if not isinstance(remarks.get(name), str | None):
            raise HeadError(f"{source}: {name} must be text, got {remarks[name]!r}")
    return {name: remarks[name] for name in _REMARKS if remarks.get(name)}


def _reason(error: Exception) -> str:
    """What torch says is wrong, in one line. Its preface, which tells how to load a pickle unsafely, is left out."""
    words = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    # A sentence ends before white space: names with dots in them stay whole.
    first = re.split(r"\.\s|\n", words, maxsplit=1)[0]
    return first[:200] or type(error).__name__
