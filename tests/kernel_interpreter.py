"""Real Triton kernels without a GPU: calls made by a child process whose Triton interprets them.

The interpreter has to be chosen before Triton is imported, and then holds for the whole process.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"

Call = tuple[str, tuple[Any, ...]]
"""What is called, as "module.function" of geoloc_kernels, and its arguments: tensors on the CPU, numbers, tuples."""


def interpreted(calls: Sequence[Call], folder: Path) -> list[Any]:
    """The results of the calls, all from one process; `folder` takes the files in between."""
    asked, answered = folder / "calls.pt", folder / "results.pt"
    torch.save(list(calls), asked)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(asked), str(answered)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: list[Any] = torch.load(answered)
    return results


def main() -> None:
    """The child: read calls, make them, write what they return."""
    asked, answered = sys.argv[1:]
    results = []
    for name, arguments in torch.load(asked):
        module, function = name.rsplit(".", 1)
        results.append(getattr(importlib.import_module(f"geoloc_kernels.{module}"), function)(*arguments))
    torch.save(results, answered)


if __name__ == "__main__":
    main()
