"""The order of the rooms, and who may import what at import time."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "geoloc_batch"
MODULES = sorted(PACKAGE.rglob("*.py"))
KERNELS = PACKAGE.parent / "kernels" / "geoloc_kernels"

# Low to high. Rooms on one level do not import each other.
LEVELS = [
    {"errors"},
    {"records", "cpus", "flags", "whole_file"},
    {"geo"},
    {"geoloc_kernels"},
    {"stream", "model", "store"},
    {"locate"},
    {"run"},
    {"evaluate"},
    {"train"},
    {"demo"},
    {"api"},
    {"__init__"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

TORCH_FREE = ["", ".cli", ".verbs", ".api", ".errors", ".records", ".cpus", ".flags", ".whole_file"]
TORCH_FREE += [".run.config", ".model.config", ".stream.config", ".stream.packing.config", ".locate.config"]
TORCH_FREE += [".model.heads", ".model.hub", ".locate.requests"]
TORCH_FREE += [".evaluate.config", ".train.config"]
TORCH_FREE += sorted(
    f".{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
    for room in ("geo", "store")
    for path in (PACKAGE / room).rglob("*.py")
    if path.name != "__init__.py"
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether it is imported when the module is) for every import statement of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import: set[ast.AST] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        at_import.add(node)
        pending.extend(ast.iter_child_nodes(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            assert node.module is not None
            yield node.module, node in at_import
            if node.module == "geoloc_batch":
                for alias in node.names:
                    yield f"geoloc_batch.{alias.name}", node in at_import


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_rooms_below_its_own(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"{path} stands in no room; give it a level here and in the plan"
    for module, _ in imports_of(path):
        parts = module.split(".")
        if parts[0] == "geoloc_kernels":
            parts = ["geoloc_batch", "geoloc_kernels"]
        if parts[0] != "geoloc_batch" or len(parts) == 1 or parts[1] == room:
            continue
        other = parts[1] if parts[1] in LEVEL else "__init__"
        assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports {module}: that room is not below"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_slow_libraries_are_imported_where_they_may_be(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    for module, at_import in imports_of(path):
        library = module.split(".")[0]
        if library == "accelerate":
            assert where == "run/workers.py" or where.startswith("train/"), f"{where} imports accelerate"
        if library == "faiss":
            assert where.startswith("locate/") or where == "geo/cells/kmeans.py", f"{where} imports faiss"
        if library in {"torch", "torchvision"}:
            assert room_of(path) not in {"geo", "store"}, f"{where} imports torch"
        if library in {
            "accelerate",
            "faiss",
            "open_clip",
            "webdataset",
            "transformers",
            "matplotlib",
            "huggingface_hub",
        }:
            assert not at_import, f"{where} imports {library} at import time; import it inside the function"
        assert library != "transformers", f"{where} imports transformers, which is a test dependency"


def test_no_torch_is_imported_by_the_modules_that_the_command_line_reads_first() -> None:
    names = ", ".join(f"geoloc_batch{name}" for name in TORCH_FREE)
    code = f"import {names}, sys; print([name for name in ('torch', 'faiss', 'open_clip') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_folder_shadows_the_kernels_package() -> None:
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_the_kernels_import_torch_and_triton_alone(path: Path) -> None:
    for module, at_import in imports_of(path):
        library = module.split(".")[0]
        if library in {"numpy", "scipy"}:
            assert path.name == "nearest_tree.py", f"{path.name} imports {library}"
        else:
            assert library in {"torch", "triton", "geoloc_kernels", *sys.stdlib_module_names}, f"{module}: {path.name}"
        needs_triton = library == "triton" or ".triton_" in module or module.endswith("nearest_tree")
        if needs_triton and not path.name.startswith("triton_"):
            assert not at_import, f"{path.name} imports {module} at import time; import it inside the function"


def test_the_kernels_can_be_used_where_there_is_nothing_but_torch() -> None:
    absent = ["triton", "numpy", "scipy", "geoloc_batch"]
    code = f"""
import sys, warnings
sys.modules.update(dict.fromkeys({absent}))
warnings.simplefilter("ignore")
import torch, geoloc_kernels
point_deg = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
print(geoloc_kernels.nearest(point_deg, point_deg + 1, k=2).id_NK.tolist())
"""
    environment = os.environ | {"PYTHONPATH": str(KERNELS.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[[0, 1], [1, 0]]"
