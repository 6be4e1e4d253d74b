"""The head's Triton kernels without a GPU: interpreted on the CPU, and built for chips that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_builds import SHARED_BYTES, Build, Kernel, build

from geoloc_kernels import triton_tiles
from geoloc_kernels.triton_tiles import Tiles, pick_tiles

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "tests/kernels/interpreted_head.py"
MAX_STACK_BYTES, MAX_REGISTERS = 16, 255
ANSWER = {"id_ptr": "*i64", "lse_ptr": "*fp64", "mean_ptr": "*fp64", "entropy_ptr": "*fp32"}
CELLS = {"cells_ptr": "*fp32", "cell_id_ptr": "*i32"}


def head_kernel(
    tiles: Tiles,
    capability: int,
    dtype: str,
    k: int,
    *,
    is_part: bool = False,
    is_bank: bool = False,
    is_even: bool = True,
    is_multiple: bool = False,
    ones: tuple[str, ...] = (),
) -> Kernel:
    """The head's kernel; with `is_multiple` D is one of 16 pieces, as 768 and 1024 are; what is in `ones` is 1.

    Triton builds a kernel of its own for either.
    """
    pointers = {"feature_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "rstd_ptr": "*fp32", "logit_ptr": "*fp32"}
    pointers |= ANSWER | CELLS | {"sums_ptr": "*fp32"} | ({"id_ptr": "*i32"} if is_part else {})
    sizes = ("num_rows", "num_cells", "feature_pieces", "feature_pieces_apart", "weight_pieces_apart")
    numbers = dict.fromkeys((*sizes, "cells_stride", "tiles_per_part"), "i32") | {"inv_temperature": "fp32"}
    constants: dict[str, Any] = dict.fromkeys(ones, 1) | {
        "k": k, "K": 1 << (k - 1).bit_length(), "R": tiles.rows, "N": tiles.cells, "E": tiles.features,
        "IS_POSTERIOR": not is_bank, "IS_EVEN": is_even, "IS_PART": is_part,
        "ALIGN": 4 if dtype == "fp32" else 8, "UPCAST": False,
    }  # fmt: skip
    types = {name: kind for name, kind in (pointers | numbers).items() if name not in ones}
    pieces = ("feature_pieces", "feature_pieces_apart", "weight_pieces_apart") if is_multiple else ()
    divisible = (*pointers, "cells_stride", *pieces)
    return Kernel("triton_head.head_kernel", types, constants, capability, tiles.warps, tiles.stages, divisible)


def rows_kernel(capability: int, k: int, tile: int, warps: int) -> Kernel:
    types = {"logit_ptr": "*fp32", "best_ptr": "*fp32"} | ANSWER | CELLS
    types |= dict.fromkeys(("num_cells", "logit_stride", "cells_stride"), "i32")
    constants = {"k": k, "K": 1 << (k - 1).bit_length(), "N": tile}
    return Kernel("triton_rows.rows_kernel", types, constants, capability, warps, 3, ("logit_ptr", *CELLS))


def scale_kernel(capability: int, dtype: str, width: int) -> Kernel:
    types = {"feature_ptr": f"*{dtype}", "scale_ptr": "*fp32", "normed_ptr": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("num_features", "feature_stride"), "i32")
    constants = {"N": width, "IS_NORMED": dtype == "fp32"}
    return Kernel("triton_scale.scale_kernel", types, constants, capability, width // 512, 3, [*types][:3])


def merge_kernel(capability: int, k: int, num_parts: int, tile: int) -> Kernel:
    types = {"part_id_ptr": "*i32", "part_logit_ptr": "*fp32", "sums_ptr": "*fp32", "logit_ptr": "*fp32"} | ANSWER
    constants = {"k": k, "K": 1 << (k - 1).bit_length(), "S": num_parts, "N": tile, "IS_POSTERIOR": True}
    return Kernel("triton_merge.merge_kernel", types | {"num_parts": "i32"}, constants, capability)


def assert_fits(kernel: Kernel, built: Build) -> None:
    """No spills worth the name, and a program for which the chip has room."""
    assert built.stack_bytes <= MAX_STACK_BYTES, kernel
    assert built.registers <= MAX_REGISTERS, kernel
    assert built.shared_bytes <= SHARED_BYTES[kernel.capability], kernel


def assert_uses_tensor_cores(kernel: Kernel, built: Build) -> None:
    """Products are the chip's own, and their operands are loaded ahead."""
    used, other = built.hopper_products, built.products
    if kernel.capability != 90:
        used, other = other, used
    assert used > 0, kernel
    assert other == 0, kernel
    assert built.asynchronous_copies > 0, kernel


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_give_the_posterior_of_float64_under_the_interpreter(marks: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_the_kernels_fit_the_chips_and_use_their_tensor_cores() -> None:
    pytest.importorskip("triton")
    heads = [
        head_kernel(triton_tiles.HOPPER_HALF, 90, "bf16", 10),
        head_kernel(triton_tiles.HOPPER_HALF, 90, "fp16", 32, is_part=True, is_even=False),
        head_kernel(triton_tiles.HOPPER_HALF_FEW_ROWS, 90, "bf16", 10, is_part=True),
        head_kernel(triton_tiles.AMPERE_HALF, 80, "bf16", 10),
    ]
    others = [rows_kernel(90, 8, 2048, 4), merge_kernel(90, 10, 256, 4096)]
    # Arguments of 1 are constants.
    ones = ("num_rows", "num_cells", "feature_pieces", "feature_pieces_apart", "weight_pieces_apart", "tiles_per_part")
    others.append(head_kernel(triton_tiles.HOPPER_HALF_FEW_ROWS, 90, "bf16", 1, is_even=False, ones=ones))
    built = build([*heads, *others])
    for kernel, one in zip([*heads, *others], built, strict=True):
        assert_fits(kernel, one)
    for kernel, one in zip(heads, built, strict=False):
        assert_uses_tensor_cores(kernel, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "capability", "dtype"),
    [
        (triton_tiles.HOPPER_HALF, 90, "bf16"),
        (triton_tiles.HOPPER_HALF, 90, "fp16"),
        (triton_tiles.HOPPER_HALF_FEW_ROWS, 90, "bf16"),
        (triton_tiles.HOPPER_HALF_FEW_ROWS, 90, "fp16"),
        (triton_tiles.HOPPER_FLOAT, 90, "fp32"),
        (triton_tiles.AMPERE_HALF, 80, "bf16"),
        (triton_tiles.AMPERE_HALF, 80, "fp16"),
        (triton_tiles.AMPERE_HALF, 120, "bf16"),
        (triton_tiles.AMPERE_FLOAT, 120, "fp32"),
        (triton_tiles.AMPERE_FLOAT, 80, "fp32"),
    ],
)
def test_every_choice_of_tiles_fits_its_chip(tiles: Tiles, capability: int, dtype: str) -> None:
    pytest.importorskip("triton")
    kinds = [(k, False, False, True) for k in (1, 10, 32)] + [(k, True, False, False) for k in (10, 32)]
    kinds += [(10, True, False, True), (10, True, True, True), (10, False, True, True)]
    kernels = [
        head_kernel(tiles, capability, dtype, k, is_part=is_part, is_bank=is_bank, is_even=is_even, is_multiple=is_even)
        for k, is_part, is_bank, is_even in kinds
    ]
    for kernel, built in zip(kernels, build(kernels), strict=True):
        assert_fits(kernel, built)
        assert_uses_tensor_cores(kernel, built)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_of_rows_and_parts_fit(capability: int) -> None:
    pytest.importorskip("triton")
    kernels = [
        rows_kernel(capability, k, tile, warps) for k in (1, 8, 32) for tile, warps in ((16, 1), (4096, 8), (8192, 16))
    ]
    kernels += [scale_kernel(capability, dtype, width) for dtype in ("bf16", "fp32") for width in (1024, 8192)]
    kernels += [merge_kernel(capability, k, num_parts, 4096) for k in (1, 10, 32) for num_parts in (2, 512)]
    for kernel, built in zip(kernels, build(kernels), strict=True):
        assert_fits(kernel, built)


@pytest.mark.parametrize(
    ("dtype", "capability", "num_rows", "expected"),
    [
        (torch.bfloat16, (9, 0), 65, triton_tiles.HOPPER_HALF),
        (torch.float16, (9, 0), 64, triton_tiles.HOPPER_HALF_FEW_ROWS),
        (torch.float32, (9, 0), 1, triton_tiles.HOPPER_FLOAT),
        (torch.bfloat16, (8, 0), 1, triton_tiles.AMPERE_HALF),
        (torch.float32, (8, 9), 9999, triton_tiles.AMPERE_FLOAT),
        (torch.bfloat16, (10, 0), 9999, triton_tiles.HOPPER_HALF),
        (torch.bfloat16, (12, 0), 9999, triton_tiles.AMPERE_HALF),
        (torch.float32, (12, 0), 9999, triton_tiles.AMPERE_FLOAT),
    ],
)
def test_tiles_follow_from_type_chip_and_rows(
    dtype: torch.dtype, capability: tuple[int, int], num_rows: int, expected: Tiles
) -> None:
    assert pick_tiles(dtype, capability, num_rows) == expected
