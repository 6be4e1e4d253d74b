"""Checkpoints that transformers wrote, and what transformers computes from them."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def config(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of a small CLIPConfig with odd sizes; `vision` and `text` are merged into its parts."""
    vision = {"hidden_size": 48, "intermediate_size": 101, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 30, "patch_size": 7, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 34, "intermediate_size": 67, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "max_position_embeddings": 13, "eos_token_id": 98, "bos_token_id": 97}
    vision |= changes.pop("vision", {})
    text |= changes.pop("text", {})
    return {"vision_config": vision, "text_config": text, "projection_dim": 23, **changes}


def make_model(*, seed: int = 0, spread: float = 3.0, **changes: Any) -> Any:
    """A CLIPModel with random weights, biases and norms, large enough that every part shows in the features."""
    from transformers import CLIPConfig, CLIPModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CLIPModel(CLIPConfig(**config(**changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 0:
                parameter.copy_(spread * noise * max(parameter[0].numel(), 8) ** -0.5 / 2)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """The checkpoint as transformers writes it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def save_bin(model: Any, folder: Path, *, shards: int = 1) -> Path:
    """The checkpoint as older versions of transformers wrote it, with the position_ids that they kept."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(model.config.to_json_string())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[number::shards])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def photos(batch: int, side: int, seed: int = 0) -> Tensor:
    """[batch, 3, side, side] uint8."""
    return torch.randint(
        0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def reference(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled, projected) as transformers computes them."""
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=(pixels.float() / 255 - MEAN) / STD).pooler_output
        return pooled, model.visual_projection(pooled)


def reference_text(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest error of a row, relative to the row's length."""
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())
