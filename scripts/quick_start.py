"""The published quick start's loop, as its users run it: one photo at a time, in fp32."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image

TOP_K = 5


class QuickStart:
    """PIL, CLIPImageProcessor, CLIP, head, soft-max, top 5.

    Args:
        vision: an image tower of transformers; what it calls pooler_output goes to the head.
        processor: from a PIL image to pixel_values.
        head: from features to logits.
        device: where all of it runs.
    """

    def __init__(self, vision: Any, processor: Any, head: torch.nn.Module, device: torch.device) -> None:
        self.vision, self.head = vision.eval().to(device, torch.float32), head.eval().to(device, torch.float32)
        self.processor, self.device = processor, device

    @torch.no_grad()
    def best_cells(self, photo: bytes) -> list[int]:
        """The five most probable cells of a JPEG."""
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        probs = self.head(self.vision(pixel_values=pixels).pooler_output).softmax(-1)
        best: list[int] = probs[0].topk(TOP_K).indices.tolist()
        return best


def processor_for(side: int) -> Any:
    """The image processor of a CLIP checkpoint for photos of `side` pixels."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def published_head(width: int, num_cells: int) -> torch.nn.Sequential:
    """LayerNorm and Linear, with random weights."""
    return torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, num_cells))
