"""Tensors of a Hugging Face CLIP checkpoint, under open_clip's names."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geoloc_batch.errors import CheckpointError
from geoloc_batch.model.checkpoint import ClipConfig
from geoloc_batch.model.hub import WEIGHT_FILES, shards_of

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class _Rule:
    """One tensor of open_clip and the checkpoint's tensors that it is made of."""

    target: str
    sources: tuple[str, ...]
    """Several are joined along their first axis."""
    is_transposed: bool = False


def find_weights(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: one, or the shards that an index names.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        files = [folder / shard for shard in shards_of(path)] if name.endswith(".index.json") else [path]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{path} names {len(missing)} shards that are not there: {_few(missing)}")
        return files
    raise CheckpointError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)}")


def sha256_of(files: Iterable[Path]) -> str:
    """One file: its SHA-256, as the hub shows it. Several: the SHA-256 over their hex digests in order of name."""
    digests = []
    for file in sorted(files, key=lambda path: path.name):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def sha256_of_tensors(state: Mapping[str, Tensor]) -> str:
    """For weights that come from no file: over names, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_state(files: Iterable[Path], config: ClipConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read weights and give them open_clip's names and layout, in fp32.

    Args:
        files: of one checkpoint, from ``find_weights``.
        config: the architecture that config.json describes.
        shapes: of the open_clip model built for it, by open_clip's names.

    Raises:
        CheckpointError: a file is damaged or unsafe, or tensors are missing, left over or of another shape.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read(file).items():
            if name in found:
                raise CheckpointError(f"{file} holds {name} once more; another shard has it already")
            found[name] = tensor
    rules = list(_rules(config))
    folder = next(iter(files)).parent
    _account(folder, found, rules, shapes)
    return {rule.target: _assemble([found[source] for source in rule.sources], rule) for rule in rules}


def _read(file: Path) -> dict[str, Tensor]:
    tensors = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    for name, tensor in tensors.items():
        if not name.endswith("position_ids") and tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(f"{file}: {name} is stored as {tensor.dtype}; only fp32, fp16 and bf16 can be read")
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}; fetch or copy it again") from None
    return tensors


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # It warns of pickles that it then refuses, and the refusal below says all of it.
            warnings.simplefilter("ignore")
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than plain tensors, or is damaged ({torch_reason(error)}). A pickle can run code, so "
            "that it is not loaded. If you trust it, convert it to model.safetensors elsewhere and pass that folder"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged or no PyTorch file: {torch_reason(error)}; fetch or copy it again"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file} must hold tensors by name and nothing else, as Hugging Face checkpoints do")
    return {str(name): tensor for name, tensor in tensors.items()}


def torch_reason(error: Exception) -> str:
    """What torch.load says is wrong, in one line. How to load the file unsafely, which it says first, is left out."""
    words = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    # A sentence ends before white space: names with dots in them stay whole.
    first = re.split(r"\.\s|\n", words, maxsplit=1)[0]
    is_advice = "weights_only" in first or first.startswith("Weights only load failed")
    return type(error).__name__ if is_advice or not first else first[:200]


def _rules(config: ClipConfig) -> Iterator[_Rule]:
    """How open_clip's tensors come from Hugging Face's names, one rule for each tensor of the model."""
    yield _Rule("logit_scale", ("logit_scale",))
    vision, text = "vision_model.", "text_model."
    yield _Rule("visual.class_embedding", (f"{vision}embeddings.class_embedding",))
    yield _Rule("visual.conv1.weight", (f"{vision}embeddings.patch_embedding.weight",))
    yield _Rule("visual.positional_embedding", (f"{vision}embeddings.position_embedding.weight",))
    yield from _both("visual.ln_pre", f"{vision}pre_layrnorm")
    yield from _both("visual.ln_post", f"{vision}post_layernorm")
    yield _Rule("visual.proj", ("visual_projection.weight",), is_transposed=True)
    yield from _layers("visual.transformer", vision, config.vision.layers)
    yield _Rule("token_embedding.weight", (f"{text}embeddings.token_embedding.weight",))
    yield _Rule("positional_embedding", (f"{text}embeddings.position_embedding.weight",))
    yield from _both("ln_final", f"{text}final_layer_norm")
    yield _Rule("text_projection", ("text_projection.weight",), is_transposed=True)
    yield from _layers("transformer", text, config.text.layers)


def _both(target: str, source: str) -> Iterator[_Rule]:
    for part in ("weight", "bias"):
        yield _Rule(f"{target}.{part}", (f"{source}.{part}",))


def _layers(target: str, source: str, num_layers: int) -> Iterator[_Rule]:
    for number in range(num_layers):
        block, layer = f"{target}.resblocks.{number}", f"{source}encoder.layers.{number}"
        yield from _both(f"{block}.ln_1", f"{layer}.layer_norm1")
        yield from _both(f"{block}.ln_2", f"{layer}.layer_norm2")
        for part in ("weight", "bias"):
            qkv = tuple(f"{layer}.self_attn.{name}_proj.{part}" for name in "qkv")
            yield _Rule(f"{block}.attn.in_proj_{part}", qkv)
        yield from _both(f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj")
        yield from _both(f"{block}.mlp.c_fc", f"{layer}.mlp.fc1")
        yield from _both(f"{block}.mlp.c_proj", f"{layer}.mlp.fc2")


def _account(
    folder: Path, found: Mapping[str, Tensor], rules: Iterable[_Rule], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of its config.json."""
    wanted: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        shape = shapes[rule.target]
        if rule.is_transposed:
            shape = shape[::-1]
        if len(rule.sources) > 1:
            shape = (shape[0] // len(rule.sources), *shape[1:])
        wanted |= dict.fromkeys(rule.sources, shape)
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(name for name in found.keys() - wanted.keys() if not name.endswith("position_ids"))
    misshapen = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in found and tuple(found[name].shape) != shape
    ]
    kinds = (("missing", missing), ("unknown", extra), ("of another shape", misshapen))
    faults = [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds if names]
    if faults:
        raise CheckpointError(f"the tensors of {folder} are not those of its config.json. {'. '.join(faults)}")


def _few(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _assemble(tensors: list[Tensor], rule: _Rule) -> Tensor:
    # A copy even where nothing changes: a tensor that still maps the file would die with it if it were truncated.
    if len(tensors) > 1:
        return torch.cat([tensor.to(torch.float32) for tensor in tensors])
    tensor = tensors[0].T if rule.is_transposed else tensors[0]
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
