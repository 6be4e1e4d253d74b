"""`geoloc doctor`: what this machine has, and what is wrong with any of it.

Each check stands alone: one that fails says so and the others go on. Everything is imported inside the checks, since
an import that breaks is what they look for.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from geoloc_batch.cpus import affinity_cpus, quota_cpus, usable_cpus


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    topic: str
    """What was looked at: python, a package, cuda, cpus, decode, output, hub, limits."""
    level: Literal["ok", "note", "problem"]
    """note: worth knowing, nothing fails for it. problem: something that geoloc does will fail."""
    text: str
    remedy: str = ""
    """What to do; given with every problem."""


_PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "webdataset": "webdataset",
    "h3": "h3",
    "numpy": "numpy",
    "scipy": "scipy",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "accelerate": "accelerate",
    "simplejpeg": "simplejpeg",
    "PIL": "pillow",
    "huggingface_hub": "huggingface_hub",
    "tyro": "tyro",
    "tqdm": "tqdm",
}


def examine(*, out: Path | None = None) -> list[Finding]:
    """Look at everything that a run needs.

    Args:
        out: the folder that results shall go to; None looks at the current folder.

    Returns:
        The findings in a fixed order of topics. Takes some seconds: packages are imported, photos are decoded.
    """
    from geoloc_batch.run.doctor_files import check_hub, check_limits, check_output
    from geoloc_batch.run.doctor_speed import check_decode

    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _check_python,
        "packages": _check_packages,
        "faiss": _check_faiss,
        "cuda": _check_cuda,
        "cpus": _check_cpus,
        "decode": check_decode,
        "output": partial(check_output, out),
        "hub": check_hub,
        "limits": check_limits,
    }
    findings: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for topic, check in checks.items():
            findings.extend(_guarded(topic, check))
    return findings


def _guarded(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks becomes a finding."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(
            topic, "problem", f"cannot be examined: {_told(error)}", "mend what the message names, look again"
        )


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Finding("python", "ok", text)


def _check_packages() -> Iterator[Finding]:
    required = _required_versions()
    for module, distribution in _PACKAGES.items():
        yield _examine_package(module, distribution, required.get(distribution.replace("_", "-"), ""))


def _examine_package(module: str, distribution: str, required: str) -> Finding:
    """One package: is it there, does it import, is it new enough."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = ""
    try:
        imported = import_module(module)
    except Exception as error:
        if not version and isinstance(error, ModuleNotFoundError):
            return Finding(module, "problem", "is not installed", f"pip install {distribution}")
        return Finding(
            module, "problem", f"{version} does not import: {_told(error)}", _import_remedy(module, str(error))
        )
    version = version or str(getattr(imported, "__version__", "version unknown"))
    if required and not _is_within(version, required):
        return Finding(module, "problem", f"{version}, needed is {required}", f"pip install '{distribution}{required}'")
    return Finding(module, "ok", version)


def _import_remedy(module: str, message: str) -> str:
    if "torchvision::" in message:
        # The registry's torchvision is built for the registry's torch, which is a CUDA build.
        return (
            "torch and torchvision are of different builds, such as a CPU torch beside the registry's torchvision; "
            "install both from one index: pip install --force-reinstall torch torchvision"
        )
    if "libcu" in message or "libnv" in message:
        return f"a CUDA library is missing: pip install --force-reinstall {module}, with its dependencies"
    return f"pip install --force-reinstall {_PACKAGES.get(module, module)}"


def _required_versions() -> dict[str, str]:
    """What this package asks of others, by distribution; empty where it runs without being installed."""
    from packaging.requirements import Requirement

    try:
        requirements = map(Requirement, metadata.requires("geoloc-batch") or ())
    except metadata.PackageNotFoundError:
        return {}
    return {one.name.replace("_", "-"): str(one.specifier) for one in requirements if not one.marker}


def _is_within(version: str, required: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(required).contains(version, prereleases=True)
    except InvalidVersion:
        return True


def _check_faiss() -> Iterator[Finding]:
    """Faiss comes in distributions that put their files over one another's."""
    names = {str(one.metadata["Name"]): one.version for one in metadata.distributions()}
    wheels = sorted(f"{name} {version}" for name, version in names.items() if name.lower().startswith("faiss"))
    if len(wheels) > 1:
        both = " ".join(wheel.split()[0] for wheel in wheels)
        remedy = f"they overwrite each other's files: pip uninstall {both}, then install one of them"
        yield Finding("faiss", "problem", f"{len(wheels)} of them are installed: {', '.join(wheels)}", remedy)
    try:
        faiss = import_module("faiss")
    except Exception as error:
        yield Finding("faiss", "problem", f"does not import: {_told(error)}", "pip install faiss-gpu (or faiss-cpu)")
        return
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if len(wheels) <= 1:
        yield Finding("faiss", "ok", f"{wheels[0] if wheels else faiss.__version__}, sees {gpus} GPUs")


def _check_cuda() -> Iterator[Finding]:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            text = f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
            text = f"{text}, CUDA {torch.version.cuda}, bf16 {'yes' if bf16 else 'no'}"
            yield Finding("cuda", "ok" if bf16 else "note", text, "" if bf16 else "pass --precision fp16")
            yield from _try_device(index)
    elif driver.exists():
        hidden = f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')})"
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        remedy = "install a torch whose CUDA the driver knows, or make the devices visible to this process"
        yield Finding(
            "cuda", "problem", f"a driver is here, but torch (built for {build}) sees no device{hidden}", remedy
        )
    else:
        yield Finding(
            "cuda", "note", "no CUDA device: encoding runs on the CPU", "use a machine with a GPU for many photos"
        )


def _try_device(index: int) -> Iterator[Finding]:
    """A device can be listed and still be broken, taken, or too old for this torch."""
    import torch

    try:
        total = torch.ones(64, 64, device=f"cuda:{index}").matmul(torch.ones(64, 64, device=f"cuda:{index}")).sum()
        torch.testing.assert_close(float(total), 64.0**3)
    except Exception as error:
        remedy = "free the device (nvidia-smi), or install a torch that is built for it"
        yield Finding("cuda", "problem", f"cuda:{index} cannot compute: {_told(error)}", remedy)


def _check_cpus() -> Iterator[Finding]:
    usable, quota = usable_cpus(), quota_cpus()
    limits = f"affinity {affinity_cpus()}, cgroup quota {'none' if quota == float('inf') else f'{quota:g}'}"
    flags = _cpu_flags()
    telling = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in flags]
    yield Finding(
        "cpus", "ok", f"{usable} of {os.cpu_count()} usable ({limits}); {' '.join(telling) or 'flags unknown'}"
    )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable:
        text = f"OMP_NUM_THREADS={threads} is more than the {usable} CPUs that this process may use"
        yield Finding("cpus", "note", text, f"export OMP_NUM_THREADS={usable}")


def _cpu_flags() -> set[str]:
    """What the first processor can do, as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
