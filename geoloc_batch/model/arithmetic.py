"""Which arithmetic a device does well, and sums that come out the same on any number of threads."""

from __future__ import annotations

import os

import torch
from torch import nn

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.fp8 import try_product

# Of the matrices; fp8 keeps in bf16 what it does not quantise.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
PRECISIONS = tuple(DTYPES)
FP8_CAPABILITY = (8, 9)


def auto_precision(device: torch.device) -> str:
    """What `--precision auto` stands for: bf16 on CUDA and on processors with bf16 matrix tiles (AMX), else fp32.

    On a CPU the rule asks the processor for its features and measures nothing, so that every rank and every resumed
    run on such a machine chooses the same; a rank on another kind of machine adopts what the first rank pinned. With
    AMX, bf16 is 3 to 5 times as fast as fp32 (2.3 against 0.29 TFLOP/s on two cores); without it most processors only
    emulate it.
    """
    if device.type == "cuda":
        return "bf16"
    return "bf16" if device.type == "cpu" and _has_bf16_tiles() else "fp32"


def _has_bf16_tiles() -> bool:
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and bool(features.get("amx_tile") and features.get("amx_bf16"))


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what does not run.

    Raises:
        ConfigError: this torch has no fp16 kernels for the CPU, or the device no 8-bit products.
    """
    if precision == "fp8":
        _check_fp8(device)
    if precision != "fp16" or device.type != "cpu":
        return
    try:
        nn.functional.conv2d(torch.ones(1, 3, 2, 2).half(), torch.ones(1, 3, 2, 2).half())
        nn.functional.linear(torch.ones(2, 2).half(), torch.ones(2, 2).half())
    except RuntimeError as error:
        raise ConfigError(f"--precision fp16 does not run on this CPU ({error}); pass fp32 or bf16") from None


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"--precision fp8 needs a CUDA device, this is {device.type}; pass bf16, or auto")
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, FP8_CAPABILITY))
        raise ConfigError(
            f"--precision fp8 needs CUDA capability {needed}, {name} has {found[0]}.{found[1]}; pass bf16, or auto"
        )
    try:
        try_product(device)
    except RuntimeError as error:
        raise ConfigError(
            f"--precision fp8 does not run on {torch.cuda.get_device_name(device)} with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); pass bf16, or auto, or use a torch that has 8-bit products scaled by "
            f"rows for capability {found[0]}.{found[1]}"
        ) from error


def fix_summation_order() -> None:
    """Make fp32 matrix products on a CPU give the same bits on any number of threads.

    MKL cuts long sums into as many parts as there are threads, where a product has too few rows to share out: a job
    resumed on fewer cores would differ in the last bit. Its strict mode does not, and is as fast at our sizes. MKL
    reads the variable at its first product, so that this has to come before; what the user has set is left alone.

    Source: oneMKL Developer Guide, "Obtaining Numerically Reproducible Results", MKL_CBWR.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
