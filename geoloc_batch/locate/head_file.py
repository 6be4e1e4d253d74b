"""Heads on disk: the published best.pt, a bare state dict, safetensors. Nothing in a file is executed untold.

Shape letters: D features, C cells.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.locate.harmless import copy_again, load_pickle
from geoloc_batch.whole_file import in_one_move

TENSORS = ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
"""LayerNorm's scale and shift, the linear layer's weight and bias. Position 1 is the dropout, which has no weights."""

# What training with several devices or torch.compile puts before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_CHOICES = {"position": ("top1", "mean"), "fusion": ("feature", "logit")}
_REMARKS = ("tap", "encoder_sha256", "partition_fingerprint", *_CHOICES)

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
    position: Literal["top1", "mean"] | None = None
    """The answer that suits it, the best cell's centroid or the posterior's mean, where the file says."""
    fusion: Literal["feature", "logit"] | None = None
    """How it was taught to fuse several views, where the file says."""

    @property
    def remarks(self) -> dict[str, str]:
        """What is known of it beside its tensors, as `save_head` takes it."""
        known = {name: getattr(self, name) for name in _REMARKS}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def state(self) -> dict[str, Tensor]:
        """Its tensors by their published names."""
        return dict(zip(TENSORS, (self.norm_weight, self.norm_bias, self.weight, self.bias), strict=True))

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    @property
    def num_cells(self) -> int:
        """C."""
        return self.weight.shape[0]


def read_head(path: str | Path, *, trust: bool = False) -> Head:
    """Read a head's file; all sizes come from it.

    Args:
        path: a best.pt ({"model": {"head.0.weight", ...}, ...}) or a bare state dict as torch.save writes them, or
            a .safetensors file with the same names. Tap, encoder_sha256 and partition_fingerprint are looked for in the
            file (safetensors' metadata, best.pt's "head"), then in a head.json beside it; position and fusion, which
            somebody may want otherwise, in the head.json first, unless it is of a head with other cells.
        trust: execute what a pickle holds, with all that this user may do, where it cannot be loaded without.

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
    beside = read_remarks(path.with_name("head.json"))
    if path.suffix == ".safetensors":
        state, metadata = _from_safetensors(data, path)
        inside = _remarks(metadata, f"{path}: metadata")
    else:
        state, written = _from_checkpoint(data, path, trust=trust)
        inside = _remarks(written, f"{path}: head")
    remarks = beside | inside
    if beside.get("partition_fingerprint") == inside.get("partition_fingerprint"):
        remarks |= {name: beside[name] for name in _CHOICES if name in beside}
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
        position=cast("Literal['top1', 'mean'] | None", remarks.get("position")),
        fusion=cast("Literal['feature', 'logit'] | None", remarks.get("fusion")),
    )


def save_head(path: str | Path, state: Mapping[str, Tensor], *, remarks: Mapping[str, str] | None = None) -> None:
    """Write a head as the published ones are, or as safetensors if the path ends so; in one move.

    Args:
        path: best.pt or NAME.safetensors; its folder must exist.
        state: the four tensors named in TENSORS.
        remarks: tap, encoder_sha256, partition_fingerprint, position and fusion, where known: safetensors keeps them as
            its metadata, best.pt under "head".
    """
    tensors = {name: state[name].detach().cpu().float().contiguous() for name in TENSORS}
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save

        data = _with_metadata(save(tensors), remarks or {})
    else:
        # Not to the file at once: torch writes the name of its file into it, here a passing one.
        buffer = io.BytesIO()
        torch.save({"model": tensors, "head": dict(remarks or {})}, buffer)
        data = buffer.getvalue()
    in_one_move(Path(path), lambda part: part.write_bytes(data))


def read_remarks(path: Path) -> dict[str, str]:
    """What a head.json says of its head; empty where there is none.

    Raises:
        HeadError: it cannot be read, or says what cannot be.
    """
    try:
        remarks = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HeadError(f"{path} cannot be read: {error}") from error
    return _remarks(remarks, str(path))


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Safetensors with metadata in the order of its names: the library's own differs from one process to the next."""
    size = int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _from_safetensors(data: bytes, path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise HeadError(f"{path} is no whole safetensors file: {error}; {copy_again(path)}") from error
    # The file begins with its header's length and the header, which `load` has checked.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _from_checkpoint(data: bytes, path: Path, *, trust: bool) -> tuple[Mapping[str, Any], object]:
    """The model's entries, and what `save_head` noted beside them."""
    loaded = load_pickle(data, path, trust=trust)
    model = loaded.get("model", loaded) if isinstance(loaded, Mapping) else loaded
    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    if not isinstance(model, Mapping):
        raise HeadError(f"{path} holds a {type(model).__name__} where a head's tensors by name should be")
    written = loaded.get("head") if isinstance(loaded, Mapping) and model is not loaded else None
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


def _remarks(remarks: object, source: str) -> dict[str, str]:
    if not isinstance(remarks, Mapping):
        raise HeadError(f"{source} must hold names and values, not a {type(remarks).__name__}")
    for name in _REMARKS:
        if not isinstance(remarks.get(name), str | None):
            raise HeadError(f"{source}: {name} must be text, got {remarks[name]!r}")
        if remarks.get(name) and remarks[name] not in _CHOICES.get(name, (remarks[name],)):
            raise HeadError(f"{source}: {name} must be {' or '.join(_CHOICES[name])}, got {remarks[name]!r}")
    return {name: remarks[name] for name in _REMARKS if remarks.get(name)}
