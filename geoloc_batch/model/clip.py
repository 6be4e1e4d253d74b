"""CLIP models from every source that `--encoder` names, as open_clip modules in fp32 on the CPU."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoloc_batch.errors import CheckpointError
from geoloc_batch.model.activations import ACTIVATIONS
from geoloc_batch.model.checkpoint import (
    ClipConfig,
    Normalization,
    TowerConfig,
    read_config,
    read_licence,
    read_normalization,
)
from geoloc_batch.model.hub import KNOWN_LICENCES, PINNED_REVISIONS, fetch_checkpoint, split_hub_id
from geoloc_batch.model.weights import find_weights, load_state, sha256_of

# The byte-pair vocabulary that OpenAI's CLIP and all checkpoints derived from it share.
CLIP_VOCABULARY = 49408
CLIP_EOS = 49407

FORMS = "a checkpoint folder, a hub id OWNER/NAME[@REVISION], open_clip:ARCH[:PRETRAINED-or-file], or demo"
_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".npz")

Tokenize = Callable[[Sequence[str]], Tensor]
"""[N] strings -> [N, context length] int64."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A loaded model and where it came from."""

    name: str
    module: Any
    """An open_clip model (CLIP, CustomTextCLIP or CoCa) in fp32 on the CPU, in eval mode."""
    sha256: str
    licence: str | None
    image_size: int
    normalization: Normalization
    shape: str
    """For people: `ViT 24x1024, patch 14`."""
    config: dict[str, Any] = field(repr=False)
    """The architecture as plain values: with sha256 and normalization it decides every feature."""
    context_length: int
    vocab_size: int
    tokenize: Tokenize = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, architecture and normalisation."""
        told = [self.sha256, self.config, asdict(self.normalization)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def load_clip(encoder: str) -> Clip:
    """Load the model that `--encoder` names.

    Raises:
        CheckpointError: it names nothing that can be read.
        HubError: it has to be downloaded and cannot be.
    """
    if encoder == "demo":
        from geoloc_batch.model.demo_weights import load_demo

        return load_demo()
    if encoder.startswith("open_clip:"):
        from geoloc_batch.model.named import load_named

        return load_named(encoder)
    path = Path(encoder).expanduser()
    if path.is_dir():
        return load_folder(path, name=encoder, licence=read_licence(path))
    if path.exists() or path.suffix.lower() in _WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"--encoder {encoder} is a file; give the folder that holds config.json and the weights, "
            f"or open_clip:ARCH:{encoder} for weights in open_clip's own form"
        )
    hub_id = split_hub_id(encoder)
    if hub_id is None:
        if re.search(r"[/\\]", encoder):
            raise CheckpointError(f"--encoder {encoder}: no such folder; give {FORMS}")
        raise CheckpointError(f"--encoder {encoder} is of no known kind and no folder; give {FORMS}")
    repo, revision = hub_id
    _refuse_mistyped(encoder, repo)
    folder = fetch_checkpoint(repo, revision)
    licence = KNOWN_LICENCES.get(repo) or read_licence(folder)
    return load_folder(folder, name=f"{repo}@{folder.name}", licence=licence)


def _refuse_mistyped(encoder: str, repo: str) -> None:
    """A hub id whose owner is the name of a folder that is here is a path with a slip in it, unless it says @REVISION.

    Raises:
        CheckpointError: so it looks.
    """
    owner, name = (Path(part) for part in repo.split("/"))
    if "@" in encoder or repo in PINNED_REVISIONS or not owner.is_dir():
        return
    try:
        folders = sorted(entry.name for entry in owner.iterdir() if entry.is_dir())
    except OSError:
        folders = []
    near = difflib.get_close_matches(name.name, folders, n=3, cutoff=0.4)
    there = f"; did you mean {' or '.join(f'{owner}/{folder}' for folder in near)}?" if near else "."
    raise CheckpointError(
        f"--encoder {encoder}: no such folder, although {owner} is one{there} For the hub's repository of that name "
        f"pass {repo}@main"
    )


def load_folder(folder: Path, *, name: str, licence: str | None) -> Clip:
    """Load a Hugging Face CLIP checkpoint from a folder.

    Raises:
        CheckpointError: see read_config, read_normalization, find_weights and load_state.
    """
    config = read_config(folder)
    normalization = read_normalization(folder, config.image_size)
    files = find_weights(folder)
    # First the hash, so that the second reading of the files comes from the page cache.
    sha256 = sha256_of(files)
    module = build_clip(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    fill(module, load_state(files, config, shapes))
    return describe(module, config, normalization, name=name, sha256=sha256, licence=licence)


def describe(
    module: nn.Module, config: ClipConfig, normalization: Normalization, *, name: str, sha256: str, licence: str | None
) -> Clip:
    """Put a module that ``build_clip`` made, and ``fill`` filled, together with what is known about it."""
    return Clip(
        name=name,
        module=module,
        sha256=sha256,
        licence=licence,
        image_size=config.image_size,
        normalization=normalization,
        shape=f"ViT {config.vision.layers}x{config.vision.width}, patch {config.patch_size}",
        config=asdict(config),
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        tokenize=_tokenizer(config, name),
    )


def build_clip(config: ClipConfig) -> nn.Module:
    """An open_clip.CLIP of this architecture without storage (on the meta device): ``fill`` gives it weights."""
    import open_clip

    vision, text = config.vision, config.text
    with torch.device("meta"):
        module: nn.Module = open_clip.CLIP(
            embed_dim=config.projection,
            vision_cfg=open_clip.CLIPVisionCfg(
                layers=vision.layers,
                width=vision.width,
                head_width=vision.width // vision.heads,
                mlp_ratio=mlp_ratio(vision.width, vision.mlp_width),
                patch_size=config.patch_size,
                image_size=config.image_size,
            ),
            text_cfg=open_clip.CLIPTextCfg(
                context_length=config.context_length,
                vocab_size=config.vocab_size,
                width=text.width,
                heads=text.heads,
                layers=text.layers,
                mlp_ratio=mlp_ratio(text.width, text.mlp_width),
                pool_type="argmax" if config.eos_id is None else "eos",
                eos_id=0 if config.eos_id is None else config.eos_id,
            ),
        )
    model: Any = module
    visual = model.visual
    _apply(vision, visual.transformer, visual.ln_pre, visual.ln_post)
    _apply(text, model.transformer, model.ln_final)
    return module


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module from ``build_clip`` its weights: the tensors become its parameters, nothing is copied."""
    model: Any = module
    # The causal mask is no weight, so that load_state_dict leaves it on the meta device.
    length = model.context_length
    model.attn_mask = torch.full((length, length), -math.inf).triu_(1)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()


def mlp_ratio(width: int, mlp_width: int) -> float:
    """The ratio from which open_clip's int(width * ratio) makes exactly ``mlp_width``."""
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:
        ratio = math.nextafter(ratio, math.inf)
    assert int(width * ratio) == mlp_width, (width, mlp_width)
    return ratio


def _apply(tower: TowerConfig, transformer: Any, *norms: nn.LayerNorm) -> None:
    """Set what open_clip's constructor has one setting for, or none: each tower's activation and epsilon."""
    for block in transformer.resblocks:
        block.mlp.gelu = ACTIVATIONS[tower.activation]()
    for norm in (*norms, *(norm for block in transformer.resblocks for norm in (block.ln_1, block.ln_2))):
        norm.eps = tower.norm_eps


def _tokenizer(config: ClipConfig, name: str) -> Tokenize:
    """CLIP's own tokenizer, or a refusal where the checkpoint was made for another vocabulary."""

    def tokenize(texts: Sequence[str]) -> Tensor:
        if config.vocab_size != CLIP_VOCABULARY or config.eos_id not in (None, CLIP_EOS):
            raise CheckpointError(
                f"{name} has {config.vocab_size} tokens with {config.eos_id} as the end, CLIP's tokenizer "
                f"{CLIP_VOCABULARY} with {CLIP_EOS}: pass token ids instead of strings"
            )
        return tokenize_plain(texts, config.context_length)

    return tokenize


def tokenize_plain(texts: Sequence[str], context_length: int) -> Tensor:
    """Token ids from CLIP's byte-pair vocabulary, [N, context_length] int64, zeros after the end.

    Raises:
        ValueError: a text is too long to fit; CLIP would read only its beginning.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    for text in texts:
        num_tokens = len(tokenizer.encode(text)) + 2
        if num_tokens > context_length:
            raise ValueError(f"the text {text[:40]!r}... has {num_tokens} tokens, the encoder takes {context_length}")
    ids: Tensor = tokenizer(list(texts), context_length=context_length)
    return ids
