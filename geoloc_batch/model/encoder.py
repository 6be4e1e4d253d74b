"""Photos to features: one model, one precision, one batch shape, one named feature.

Shape letters: B batch, S image side, D features, N texts, L tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from geoloc_batch.model.arithmetic import auto_precision, check_precision, fix_summation_order
from geoloc_batch.model.attention import DEFAULT, attending, check_sdpa
from geoloc_batch.model.batch_size import CPU_BATCH, CUDA_BATCHES
from geoloc_batch.model.choice import is_measured
from geoloc_batch.model.chunks import Chunks, chunk_size
from geoloc_batch.model.clip import Clip, load_clip
from geoloc_batch.model.compile_cache import OFF, cache_root, compiling, graph_facts, graph_folder
from geoloc_batch.model.compiled import CompiledTower
from geoloc_batch.model.config import STREETCLIP, EncoderConfig
from geoloc_batch.model.options import check_options, device_of
from geoloc_batch.model.settling import settle_by_trying
from geoloc_batch.model.text import TextTower
from geoloc_batch.model.tower import attention_shape, build_tower
from geoloc_batch.model.turn import never

# Of the batch's pixels: what lies on the device beside the batch that is computed, with room to spare.
_BATCHES_BESIDE = 4


def load_encoder(
    encoder: str = STREETCLIP,
    *,
    tap: Literal["pooled", "projected"] = "pooled",
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    compile_mode: Literal["auto", "default", "max-autotune-no-cudagraphs"] = "auto",
    sdpa: Literal["auto", "default", "flash", "efficient", "cudnn", "math"] = "auto",
    compile_cache: str = "",
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
        precision: of the arithmetic; auto is bf16 on CUDA and on processors with bf16 matrix tiles (AMX), else fp32;
            fp8 needs a CUDA device of capability 8.9. Features are float32 in any case.
        batch_size: the one number of images that `encode` takes; auto or 0 is the largest of 64, 128 and 256 that
            fits, found by trying, on CUDA, and 32 elsewhere.
        compile: torch.compile; auto is on for CUDA and off elsewhere.
        compile_mode: torch.compile's; auto is what `geoloc warmup` has chosen on this device, else default.
        sdpa: torch's kernel for attention; default is torch's own choice, and auto the fastest, timed, on CUDA, and
            default elsewhere.
        compile_cache: folder of compiled graphs; "" is geoloc_batch/compile below the user's cache folder, off none.
        device: such as "cuda:1"; None takes the first CUDA device, else the CPU.

    Returns:
        The encoder, on its device, in eval mode.

    Raises:
        ConfigError: an option has a value that it cannot have, here or on this device.
        CheckpointError: the checkpoint is missing, incomplete, damaged or of an unknown form.
        HubError: it has to be downloaded and cannot be.
        OutOfMemoryError: torch's, where a batch size was to be found and not even the smallest fits.
    """
    config = EncoderConfig(
        encoder=encoder,
        tap=tap,
        precision=precision,
        batch_size=batch_size,
        compile=compile,
        compile_mode=compile_mode,
        sdpa=sdpa,
        compile_cache=compile_cache,
    )
    place = device_of(device)
    check_options(config)
    is_cuda = place.type == "cuda"
    chosen = auto_precision(place) if precision == "auto" else precision
    check_precision(chosen, place)
    fix_summation_order()
    loaded = Encoder(
        load_clip(encoder),
        tap=tap,
        precision=chosen,
        batch_size=config.given_batch_size or (CUDA_BATCHES[0] if is_cuda else CPU_BATCH),
        compiled=compile == "on" or (compile == "auto" and is_cuda),
        compile_mode=DEFAULT if compile_mode == "auto" else compile_mode,
        sdpa=DEFAULT if sdpa == "auto" else sdpa,
        compile_cache=compile_cache,
        device=place,
    )
    check_sdpa(loaded.sdpa, attention_shape(loaded.tower), place)
    if is_measured(place):
        settle_by_trying(loaded, config)
    return loaded


class Encoder:
    """A CLIP image encoder at one fixed shape, with its text tower at hand. Made by `load_encoder`.

    At one precision, batch size and device a row's features depend on that row's pixels alone, not on its place in
    the batch nor on its neighbours; on a CPU also not on the number of threads.
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
    """fp32, bf16, fp16 or fp8."""
    batch_size: int
    device: torch.device
    compiled: bool
    compile_mode: str
    """torch.compile's, of no meaning where it is not compiled."""
    sdpa: str
    """Which kernel computes attention; default: torch chooses."""
    compile_cache: str
    """As `load_encoder` takes it."""
    logit_scale: float
    """What CLIP multiplies the cosine of image and text by before the soft-max."""
    is_stopped: Callable[[], bool]
    """Asked while another process compiles the same; where it answers True, `encode` raises StopRequested."""

    def __init__(
        self,
        clip: Clip,
        *,
        tap: str,
        precision: str,
        batch_size: int,
        compiled: bool,
        device: torch.device,
        compile_mode: str = DEFAULT,
        sdpa: str = DEFAULT,
        compile_cache: str = OFF,
    ) -> None:
        self._clip = clip
        self.name, self.sha256, self.fingerprint, self.licence = clip.name, clip.sha256, clip.fingerprint, clip.licence
        self.image_size = clip.image_size
        self.tap, self.precision, self.batch_size, self.compiled = tap, precision, batch_size, compiled
        self.device, self.compile_cache, self.compile_mode, self.sdpa = device, compile_cache, compile_mode, sdpa
        self.is_stopped = never
        self.logit_scale = float(clip.module.logit_scale.exp())
        self._text = TextTower(clip, device)
        tower = build_tower(clip.module.visual, clip.normalization, tap=tap, precision=precision, name=clip.name)
        self.dim = tower.dim
        self.tower = tower.to(device).eval()
        self.settle()

    def settle(
        self, *, batch_size: int | None = None, compile_mode: str | None = None, sdpa: str | None = None
    ) -> None:
        """Take what was found by trying things out. Before the first batch: afterwards it compiles once more."""
        self.batch_size = batch_size or self.batch_size
        self.compile_mode, self.sdpa = compile_mode or self.compile_mode, sdpa or self.sdpa
        self._is_cold = self.compiled
        self._run: Callable[[Tensor], Tensor] = self.tower
        if self.compiled:
            self._run = CompiledTower(self.tower, sdpa=self.sdpa, mode=self.compile_mode)
        if self.device.type == "cpu" and self.precision != "fp32":
            size = chunk_size(self.batch_size, self.tower.num_tokens)
            self._run = Chunks(self._run, size=size, num_threads=torch.get_num_threads())

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Features of one full batch.

        Args:
            pixels_B3SS: [batch_size, 3, image_size, image_size] uint8, RGB, on any device; channels last in memory
                saves a copy. A shorter last batch is padded by the caller with anything, and the padding's rows
                dropped.

        Returns:
            [batch_size, dim] float32 on the encoder's device, not normalised.

        Raises:
            ValueError: another shape or dtype.
            StopRequested: see is_stopped.
        """
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        if tuple(pixels_B3SS.shape) != shape or pixels_B3SS.dtype != torch.uint8:
            raise ValueError(
                f"{self.name} takes pixels of {list(shape)} uint8, got {list(pixels_B3SS.shape)} {pixels_B3SS.dtype}; "
                "pad a short batch, or load the encoder with another batch_size"
            )
        # Waits for the copy: the caller may fill pinned pixels anew as soon as this returns.
        pixels_BSS3 = pixels_B3SS.to(self.device).permute(0, 2, 3, 1).contiguous()
        # Strides are written anew, since those of sides of length 1 may be anything: a compiled graph sees one form.
        pixels_BSS3 = pixels_BSS3.flatten().view(self.batch_size, self.image_size, self.image_size, 3)
        if self._is_cold:
            return self._first(pixels_BSS3)
        # A compiled graph has its backend within.
        with torch.inference_mode(), self._exact_convolution(), attending(DEFAULT if self.compiled else self.sdpa):
            return self._run(pixels_BSS3)

    def _first(self, pixels_BSS3: Tensor) -> Tensor:
        """The call that compiles, or starts from what another process compiled."""
        folder, facts = self.graph_folder(), self.graph_facts()
        cache = nullcontext() if folder is None else compiling(folder, facts, is_stopped=self.is_stopped)
        with torch.inference_mode(), self._exact_convolution(), cache:
            features_BD = self._run(pixels_BSS3)
        self._is_cold = False
        return features_BD

    def try_out(self, batch_size: int) -> None:
        """Compute a black batch of another size, uncompiled, beside what a run keeps on the device.

        Raises:
            OutOfMemoryError: torch's.
        """
        shape = (batch_size, self.image_size, self.image_size, 3)
        beside = torch.empty((_BATCHES_BESIDE, *shape), dtype=torch.uint8, device=self.device)
        with torch.inference_mode(), self._exact_convolution(), attending(self.sdpa):
            self.tower(torch.zeros(shape, dtype=torch.uint8, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        del beside

    def graph_facts(self) -> dict[str, str]:
        """What this encoder's compiled graph depends on."""
        return graph_facts(
            self.tower,
            batch_size=self.batch_size,
            precision=self.precision,
            sdpa=self.sdpa,
            compile_mode=self.compile_mode,
            device=self.device,
        )

    def cache_root(self) -> Path | None:
        """The folder of compiled graphs; None where it is not compiled, or nothing is kept."""
        return cache_root(self.compile_cache) if self.compiled else None

    def graph_folder(self) -> Path | None:
        """Where this encoder's compiled graph is kept; None where it is not compiled or not kept."""
        root = self.cache_root()
        return graph_folder(root, self.graph_facts()) if root else None

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
        return self._text.encode(texts)

    def at_precision(self, precision: str) -> Encoder:
        """The same model at another precision, from weights that are loaded already: for a unit that fp16 overflowed.

        Raises:
            ConfigError: the device does not compute in it.
        """
        check_precision(precision, self.device)
        # fp32 has few of the backends of other precisions, and no need of speed: it stands in, or is compared with.
        sdpa = self.sdpa if precision in (self.precision, "bf16", "fp16", "fp8") else DEFAULT
        other = Encoder(
            self._clip,
            tap=self.tap,
            precision=precision,
            batch_size=self.batch_size,
            compiled=self.compiled,
            compile_mode=self.compile_mode,
            sdpa=sdpa,
            compile_cache=self.compile_cache,
            device=self.device,
        )
        other.is_stopped = self.is_stopped
        return other

    def summary(self) -> str:
        """One line for people: what runs and how, its hash and its licence."""
        how = f"{self.tap} {self.dim}-d, {self.precision}"
        how += f", attention by {self.sdpa}" if self.sdpa != DEFAULT else ""
        how += f", compiled: {self.compile_mode}" if self.compiled else ""
        return (
            f"{self.name} ({self._clip.shape}, {self.image_size} px, {how}), "
            f"sha256 {self.sha256[:12]}, licence {self.licence or 'not stated'}"
        )

    def _exact_convolution(self) -> AbstractContextManager[object]:
        # cuDNN convolves fp32 in TF32 unless told otherwise, which would cost the patch embedding 13 bits.
        if self.device.type == "cuda" and self.precision == "fp32":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()
