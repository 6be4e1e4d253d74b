"""Photos to features: one model, one precision, one batch shape, one named feature.

Shape letters: B batch, S image side, D features, N texts, L tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.clip import Clip, load_clip
from geoloc_batch.model.config import STREETCLIP, EncoderConfig
from geoloc_batch.model.tower import DTYPES, VisionTower, drop_projection

CUDA_BATCH, CPU_BATCH = 256, 32
TEXTS_PER_STEP = 256


def load_encoder(
    encoder: str = STREETCLIP,
    *,
    tap: Literal["pooled", "projected"] = "pooled",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    batch_size: int = 0,
    compile: Literal["auto", "on", "off"] = "auto",
    device: str | torch.device | None = None,
) -> Encoder:
    """Load an image encoder and make it ready to run.

    Example:
        >>> encoder = load_encoder("demo", batch_size=4)
        >>> encoder.encode(torch.zeros(4, 3, 56, 56, dtype=torch.uint8)).shape
        torch.Size([4, 192])

    Args:
        encoder: a folder with a Hugging Face CLIP checkpoint (config.json with model.safetensors, sharded safetensors,
            or pytorch_model.bin); a hub id OWNER/NAME[@REVISION], downloaded when it is not in the cache (HF_HOME,
            HF_ENDPOINT and HF_HUB_OFFLINE are honoured); open_clip:ARCH[:PRETRAINED-or-file]; or demo, a small model
            with seeded random weights.
        tap: pooled, the class token after the last layer norm, which heads take; or projected, the same after CLIP's
            projection, which text features are compared with.
        precision: of the arithmetic; auto is bf16 on CUDA and fp32 elsewhere. Features are float32 in any case.
        batch_size: the one number of images that `encode` takes; 0 is 256 on CUDA and 32 elsewhere.
        compile: torch.compile; auto is on for CUDA and off elsewhere.
        device: such as "cuda:1"; None takes the first CUDA device, else the CPU.

    Returns:
        The encoder, on its device, in eval mode.

    Raises:
        ConfigError: an option has a value that it cannot have, here or on this device.
        CheckpointError: the checkpoint is missing, incomplete, damaged or of an unknown form.
        HubError: it has to be downloaded and cannot be.
    """
    EncoderConfig(encoder=encoder, tap=tap, precision=precision, batch_size=batch_size, compile=compile)
    place = _device(device)
    _choice("--tap", tap, ("pooled", "projected"))
    _choice("--compile", compile, ("auto", "on", "off"))
    _choice("--precision", precision, ("auto", *DTYPES))
    is_cuda = place.type == "cuda"
    if precision == "auto":
        precision = "bf16" if is_cuda else "fp32"
    _check_precision(precision, place)
    return Encoder(
        load_clip(encoder),
        tap=tap,
        precision=precision,
        batch_size=batch_size or (CUDA_BATCH if is_cuda else CPU_BATCH),
        compiled=compile == "on" or (compile == "auto" and is_cuda),
        device=place,
    )


class Encoder:
    """A CLIP image encoder at one fixed shape, with its text tower at hand. Made by `load_encoder`.

    At one precision, batch size and device a row's features depend on that row's pixels alone, not on its place in
    the batch nor on its neighbours.
    """

    name: str
    """As the user gave it; a hub id with the commit that it stood for."""
    sha256: str
    """Of the weights' file; of several files, see weights.sha256_of; of demo, its tensors."""
    fingerprint: str
    """SHA-256 over weights, architecture and normalisation: equal where, at equal precision, features are."""
    licence: str | None
    image_size: int
    """Side of the photos, pixels."""
    dim: int
    """Length of a feature."""
    tap: str
    """pooled or projected."""
    precision: str
    """fp32, bf16 or fp16."""
    batch_size: int
    device: torch.device
    compiled: bool
    logit_scale: float
    """What CLIP multiplies the cosine of image and text by before the soft-max."""

    def __init__(
        self, clip: Clip, *, tap: str, precision: str, batch_size: int, compiled: bool, device: torch.device
    ) -> None:
        self._clip = clip
        self.name, self.sha256, self.fingerprint, self.licence = clip.name, clip.sha256, clip.fingerprint, clip.licence
        self.image_size = clip.image_size
        self.tap, self.precision, self.batch_size, self.compiled = tap, precision, batch_size, compiled
        self.device = device
        self.logit_scale = float(clip.module.logit_scale.exp())
        self._text_is_placed = False
        visual = clip.module.visual
        if tap == "pooled":
            drop_projection(visual, clip.name)
        self.tower = VisionTower(visual, clip.normalization, precision=precision).to(device).eval()
        self._run = torch.compile(self.tower, dynamic=False, fullgraph=True) if compiled else self.tower
        self.dim = self._find_dim()

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Features of one full batch.

        Args:
            pixels_B3SS: [batch_size, 3, image_size, image_size] uint8, RGB, on any device. A shorter last batch is
                padded by the caller with anything, and the padding's rows dropped.

        Returns:
            [batch_size, dim] float32 on the encoder's device, not normalised.

        Raises:
            ValueError: another shape or dtype.
        """
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        if tuple(pixels_B3SS.shape) != shape or pixels_B3SS.dtype != torch.uint8:
            raise ValueError(
                f"{self.name} takes pixels of {list(shape)} uint8, got {list(pixels_B3SS.shape)} {pixels_B3SS.dtype}; "
                "pad a short batch, or load the encoder with another batch_size"
            )
        with torch.inference_mode(), self._exact_convolution():
            feature_BD: Tensor = self._run(pixels_B3SS.to(self.device, non_blocking=True))
        return feature_BD

    def encode_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Features of texts, in the space of the `projected` tap. Always computed in fp32: it happens once a run.

        Args:
            texts: [N] strings, or [N, L] int64 token ids with their start and end tokens, padded at the end, L at
                most the model's context length.

        Returns:
            [N, projection] float32 on the encoder's device, not normalised.

        Raises:
            ValueError: more tokens than the model takes, or an id outside its vocabulary.
            CheckpointError: strings were given and the checkpoint's vocabulary is not CLIP's.
        """
        if not isinstance(texts, Tensor):
            texts = self._clip.tokenize([texts] if isinstance(texts, str) else texts)
        ids_NL = self._checked_ids(texts)
        if not self._text_is_placed:
            _place_text(self._clip.module, self.device)
            self._text_is_placed = True
        with torch.inference_mode():
            steps = torch.split(ids_NL.to(self.device), TEXTS_PER_STEP)
            return torch.cat([self._clip.module.encode_text(step) for step in steps]).float()

    def summary(self) -> str:
        """One line for people: what runs, its hash and its licence."""
        return (
            f"{self.name} ({self._clip.shape}, {self.image_size} px, {self.tap} {self.dim}-d, {self.precision}), "
            f"sha256 {self.sha256[:12]}, licence {self.licence or 'not stated'}"
        )

    def _checked_ids(self, ids_NL: Tensor) -> Tensor:
        """Ids padded to the context length. What follows a text's end is never looked at: attention is causal."""
        length, vocab = self._clip.context_length, self._clip.vocab_size
        if ids_NL.ndim != 2 or not 1 <= ids_NL.shape[1] <= length or len(ids_NL) == 0:
            raise ValueError(f"token ids must be [N, 1..{length}] with N from 1, got {list(ids_NL.shape)}")
        lowest, highest = int(ids_NL.min()), int(ids_NL.max())
        if lowest < 0 or (vocab and highest >= vocab):
            raise ValueError(f"token ids must be from 0 to {vocab - 1}, got {lowest} to {highest}")
        return nn.functional.pad(ids_NL.long(), (0, length - ids_NL.shape[1]))

    def _exact_convolution(self) -> AbstractContextManager[object]:
        # cuDNN convolves fp32 in TF32 unless told otherwise, which would cost the patch embedding 13 bits.
        if self.device.type == "cuda" and self.precision == "fp32":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()

    def _find_dim(self) -> int:
        """Length of a feature."""
        visual: Any = self.tower.visual
        if self.tap == "pooled":
            return int(visual.ln_post.normalized_shape[0])
        if self.tower.is_plain:
            return int(visual.proj.shape[1])
        with torch.inference_mode():
            side = self.image_size
            return int(self.tower(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)).shape[1])


def _place_text(module: Any, device: torch.device) -> None:
    """Move everything but the image tower, which keeps its own precision."""
    visual, module.visual = module.visual, None
    try:
        module.to(device)
    finally:
        module.visual = visual


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is unknown: {str(error).splitlines()[0]}") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device} is not there: this process sees {torch.cuda.device_count()} CUDA devices")
    return place


def _check_precision(precision: str, device: torch.device) -> None:
    if precision != "fp16" or device.type != "cpu":
        return
    try:
        nn.functional.conv2d(torch.ones(1, 3, 2, 2).half(), torch.ones(1, 3, 2, 2).half())
        nn.functional.linear(torch.ones(2, 2).half(), torch.ones(2, 2).half())
    except RuntimeError as error:
        raise ConfigError(f"--precision fp16 does not run on this CPU ({error}); pass fp32 or bf16") from None


def _choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
