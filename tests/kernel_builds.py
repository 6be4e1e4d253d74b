"""Triton kernels built for a GPU that is not there, and what the machine code takes of it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""What a program may have of a chip's shared memory, by compute capability."""


class Kernel(NamedTuple):
    """A kernel to build."""

    name: str
    """Such as "triton_nearest.nearest_kernel"."""
    types: dict[str, str]
    """Triton's types of the arguments, such as {"point_ptr": "*fp64"}."""
    constants: dict[str, Any]
    """The other arguments."""
    capability: int
    """80, 90 or 120."""
    warps: int = 4
    stages: int = 3
    divisible: Sequence[str] = ()
    """Arguments that are multiples of 16, such as addresses are."""


class Build(NamedTuple):
    """What the machine code of one thread, or program, takes."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    hopper_products: int
    """Asynchronous tensor-core instructions of Hopper, in the PTX."""
    products: int
    """Tensor-core instructions of the chips before."""
    asynchronous_copies: int
    """Loads into shared memory that nobody waits for at once."""


def build(kernels: Sequence[Kernel]) -> list[Build]:
    """Build them in a child process: Triton's settings there are nobody else's."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "PYTHONPATH": str(KERNELS),
            "TRITON_CACHE_DIR": cache,
            "TRITON_DEFAULT_FP_FUSION": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps(kernels), env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return [Build(*numbers) for numbers in json.loads(done.stdout)]


def main() -> None:
    """The child: kernels come as JSON, numbers leave as JSON."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    for name, types, constants, capability, warps, stages, divisible in json.load(sys.stdin):
        module, function = name.split(".")
        kernel = getattr(importlib.import_module(f"geoloc_kernels.{module}"), function)
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        fixed = {
            (kernel.arg_names.index(argument),): tuple(value) if isinstance(value, list) else value
            for argument, value in constants.items()
        }
        multiples = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in divisible}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=multiples)
        options = {"num_warps": warps, "num_stages": stages}
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            told = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            )
        usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
        counts = [built.asm["ptx"].count(word) for word in ("wgmma.mma_async", "mma.sync", "cp.async.c")]
        found.append((usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, *counts))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
