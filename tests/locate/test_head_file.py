"""Files of heads: the published form and others, broken ones, and ones that would run code."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch
from locate_samples import C, D
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.locate.head_file import TENSORS, read_head, save_head

State = dict[str, Tensor]


def test_a_published_checkpoint_loads_with_all_that_training_left_in_it(path: Path, state: State) -> None:
    torch.save(samples.published_checkpoint(state), path)
    head = read_head(path)
    samples.assert_holds(head, state)
    assert (head.num_cells, head.dim, head.tap) == (C, D, "pooled")
    assert head.encoder_sha256 is head.partition_fingerprint is None
    assert head.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert head.path == str(path)


@pytest.mark.parametrize("part", sorted(samples.published_checkpoint({}).keys() - {"model"}))
def test_each_kind_of_thing_that_training_leaves_loads_by_itself(path: Path, state: State, part: str) -> None:
    torch.save({"model": state, part: samples.published_checkpoint(state)[part]}, path)
    samples.assert_holds(read_head(path), state)


def test_names_that_older_and_newer_numpy_and_python_write_are_known(path: Path, state: State) -> None:
    torch.save({"model": state, "x": [np.float32(1.5), Path("runs")]}, path)
    for old, new in ((b"numpy._core", b"numpy.core"), (b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")):
        renamed = io.BytesIO()
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(renamed, "w") as target:
            for name in source.namelist():
                data = source.read(name)
                target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
        other = path.with_name("renamed.pt")
        other.write_bytes(renamed.getvalue())
        samples.assert_holds(read_head(other), state)


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}},
        lambda state: {"model": {name: tensor.double() for name, tensor in state.items()}},
        lambda state: {"model": state | {"head.2.weight": state["head.2.weight"].T.contiguous().T}},
        lambda state: {"model": state, "head": "LayerNorm and Linear"},
    ],
    ids=["bare", "module", "compiled", "parameters", "float64", "transposed", "another's head"],
)
def test_other_forms_of_the_same_head_load_alike(path: Path, state: State, form: Callable[[State], Any]) -> None:
    torch.save(form(state), path)
    samples.assert_holds(read_head(path), state)


def test_half_precision_weights_are_widened(path: Path, state: State) -> None:
    narrow = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save({"model": narrow}, path)
    samples.assert_holds(read_head(path), narrow)
    save_file(narrow, path.with_suffix(".safetensors"))
    samples.assert_holds(read_head(path.with_suffix(".safetensors")), narrow)


def test_the_old_torch_format_without_a_zip_loads(path: Path, state: State) -> None:
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    samples.assert_holds(read_head(path), state)


@pytest.mark.parametrize("name", ["best.pt", "north.safetensors"])
def test_a_saved_head_comes_back_with_what_was_noted(tmp_path: Path, state: State, name: str) -> None:
    remarks = {"tap": "projected", "encoder_sha256": "ab" * 32, "partition_fingerprint": "cd" * 32}
    remarks |= {"position": "mean", "fusion": "logit"}
    save_head(tmp_path / name, state, remarks=remarks)
    head = read_head(tmp_path / name)
    samples.assert_holds(head, state)
    assert (head.tap, head.encoder_sha256, head.partition_fingerprint, head.position, head.fusion) == tuple(
        remarks.values()
    )
    assert head.remarks == remarks
    assert [path.name for path in tmp_path.iterdir()] == [name]
    save_head(tmp_path / name, state)
    head = read_head(tmp_path / name)
    assert (head.tap, head.position, head.fusion) == ("pooled", None, None)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_head_saved_twice_gives_the_same_bytes_whatever_its_name(tmp_path: Path, state: State, suffix: str) -> None:
    remarks = {f"r{number}": "x" for number in range(9)}
    save_head(tmp_path / f"a{suffix}", state, remarks=remarks)
    save_head(tmp_path / f"other{suffix}", dict(reversed(state.items())), remarks=dict(reversed(remarks.items())))
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "other"))
    if suffix == ".safetensors":
        assert first == second
        assert safe_open(tmp_path / "a.safetensors", "pt").metadata() == remarks
    save_head(tmp_path / f"third{suffix}", state, remarks=remarks)
    assert (tmp_path / f"third{suffix}").read_bytes() == first


def test_what_a_published_reader_expects_of_best_pt_is_what_is_saved(path: Path, state: State) -> None:
    save_head(path, state)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded["model"]) == list(TENSORS)
    assert all(torch.equal(loaded["model"][name], state[name]) for name in TENSORS)


def test_a_head_json_beside_the_head_speaks_where_the_file_is_silent(tmp_path: Path, state: State) -> None:
    samples.write_remarks(tmp_path, {"tap": "projected", "encoder_sha256": "ab" * 32, "metrics": {"top1": 0.3}})
    torch.save({"model": state}, tmp_path / "best.pt")
    head = read_head(tmp_path / "best.pt")
    assert (head.tap, head.encoder_sha256) == ("projected", "ab" * 32)
    save_head(tmp_path / "own.safetensors", state, remarks={"tap": "pooled"})
    head = read_head(tmp_path / "own.safetensors")
    assert (head.tap, head.encoder_sha256) == ("pooled", "ab" * 32)


def test_the_head_json_decides_position_and_fusion_unless_it_is_of_other_cells(tmp_path: Path, state: State) -> None:
    inside = {"position": "top1", "fusion": "feature", "partition_fingerprint": "cd" * 32}
    save_head(tmp_path / "best.pt", state, remarks=inside)
    samples.write_remarks(tmp_path, {**inside, "position": "mean", "fusion": "logit"})
    head = read_head(tmp_path / "best.pt")
    assert (head.position, head.fusion) == ("mean", "logit")
    samples.write_remarks(tmp_path, {"position": "mean", "partition_fingerprint": "ef" * 32})
    head = read_head(tmp_path / "best.pt")
    assert (head.position, head.fusion, head.partition_fingerprint) == ("top1", "feature", "cd" * 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"head.json cannot be read"),
        ("[]", r"head.json must hold names and values, not a list"),
        ('{"tap": 3}', r"head.json: tap must be text, got 3"),
        ('{"encoder_sha256": ["ab"]}', r"head.json: encoder_sha256 must be text"),
        ('{"position": "best"}', r"head.json: position must be top1 or mean, got 'best'"),
        ('{"fusion": "features"}', r"head.json: fusion must be feature or logit, got 'features'"),
        ('{"fusion": 1}', r"head.json: fusion must be text, got 1"),
    ],
)
def test_a_head_json_that_says_nothing_sensible_is_refused(path: Path, state: State, text: str, words: str) -> None:
    torch.save({"model": state}, path)
    path.with_name("head.json").write_text(text)
    with pytest.raises(HeadError, match=words):
        read_head(path)
