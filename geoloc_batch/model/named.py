"""open_clip's own models: `open_clip:ARCH[:PRETRAINED-or-file]`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoloc_batch.errors import CheckpointError, HubError
from geoloc_batch.model.checkpoint import Normalization
from geoloc_batch.model.clip import Clip, Tokenize
from geoloc_batch.model.hub import first_line
from geoloc_batch.model.weights import sha256_of, sha256_of_tensors, torch_reason

log = logging.getLogger(__name__)

RANDOM_SEED = 0


def load_named(encoder: str) -> Clip:
    """Load an architecture of open_clip with pretrained weights, with weights from a file, or with seeded random ones.

    Raises:
        CheckpointError: no such architecture, tag or file, or a model whose photos are prepared in another way.
        HubError: the weights have to be downloaded and cannot be.
    """
    import open_clip

    _, _, rest = encoder.partition(":")
    arch, _, pretrained = rest.partition(":")
    arch = arch.replace("/", "-")
    if arch not in open_clip.list_models():
        near = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        raise CheckpointError(
            f"--encoder {encoder}: open_clip has no architecture {arch!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "; open_clip.list_models() names them")
        )
    weights = _weights(encoder, arch, pretrained)
    model = _create(encoder, arch, pretrained, weights)
    if weights is None:
        log.warning("%s: no weights were named, so they are random (seed %d)", encoder, RANDOM_SEED)
    preprocess: dict[str, Any] = model.visual.preprocess_cfg
    _check_resizing(encoder, preprocess)
    return Clip(
        name=encoder,
        module=model,
        sha256=sha256_of([weights]) if weights else sha256_of_tensors(model.state_dict()),
        licence=None,
        image_size=_side(encoder, preprocess),
        normalization=Normalization(mean=tuple(preprocess["mean"]), std=tuple(preprocess["std"])),
        shape=arch,
        config=open_clip.get_model_config(arch),
        context_length=open_clip.get_model_config(arch)["text_cfg"].get("context_length", 77),
        vocab_size=open_clip.get_model_config(arch)["text_cfg"].get("vocab_size", 0),
        tokenize=_tokenizer(arch),
    )


def _weights(encoder: str, arch: str, pretrained: str) -> Path | None:
    """The file that holds the weights, downloaded where it has to be; None for random ones."""
    import open_clip
    from open_clip.pretrained import download_pretrained

    if not pretrained:
        return None
    tagged = open_clip.get_pretrained_cfg(arch, pretrained)
    if not tagged:
        file = Path(pretrained).expanduser()
        if not file.is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
            raise CheckpointError(f"--encoder {encoder}: {pretrained!r} is no file and no tag of {arch} (tags: {tags})")
        return file
    if tagged.get("quick_gelu") and not open_clip.get_model_config(arch).get("quick_gelu"):
        raise CheckpointError(
            f"--encoder {encoder}: these weights were trained with QuickGELU and {arch} computes GELU; "
            f"use open_clip:{arch}-quickgelu:{pretrained}"
        )
    # Before the download, which may be of gigabytes.
    _check_resizing(encoder, tagged)
    try:
        return Path(download_pretrained(tagged))
    except Exception as error:
        # Whatever urllib or huggingface_hub raise: to the user all of it is one download that failed.
        source = tagged.get("hf_hub") or tagged.get("url")
        raise HubError(
            f"the weights of {encoder} could not be downloaded from {source}: {first_line(error)}. Place the file by "
            f"hand and pass open_clip:{arch}:FILE"
        ) from error


def _create(encoder: str, arch: str, pretrained: str, weights: Path | None) -> Any:
    """The module, in fp32 on the CPU."""
    import open_clip

    # A tag brings its own mean, std and size along; a file has only the architecture's.
    preprocess = _tagged_preprocessing(open_clip.get_pretrained_cfg(arch, pretrained)) if pretrained else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model: nn.Module = open_clip.create_model(
                arch,
                pretrained=str(weights) if weights else None,
                precision="fp32",
                device="cpu",
                force_preprocess_cfg=preprocess or None,
            )
    except Exception as error:
        raise CheckpointError(
            f"--encoder {encoder}: open_clip cannot load it: {torch_reason(error)}"
            + ("; is the file this architecture's, and does it hold nothing but weights?" if weights else "")
        ) from error
    model.requires_grad_(False)
    return model.eval()


def _tagged_preprocessing(tagged: dict[str, Any]) -> dict[str, Any]:
    return {key: tagged[key] for key in ("mean", "std", "interpolation", "resize_mode") if tagged.get(key) is not None}


def _side(encoder: str, preprocess: dict[str, Any]) -> int:
    """The side of the square photos that the model takes."""
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise CheckpointError(f"--encoder {encoder} takes photos of {size}; only square ones are supported")
    return int(sides.pop())


def _check_resizing(encoder: str, preprocess: dict[str, Any]) -> None:
    for key, wanted in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if preprocess.get(key, wanted) != wanted:
            raise CheckpointError(
                f"--encoder {encoder} was trained on photos resized by {key}={preprocess[key]!r}; "
                f"photos are prepared by {wanted!r}, so that its features would be off"
            )


def _tokenizer(arch: str) -> Tokenize:
    def tokenize(texts: Sequence[str]) -> Tensor:
        import open_clip

        ids: Tensor = open_clip.get_tokenizer(arch)(list(texts))
        return ids

    return tokenize
