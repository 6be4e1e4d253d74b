"""Files of heads: the published form and others, broken ones, and ones that would run code."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.locate.harmless import HARMLESS_TYPES
from geoloc_batch.locate.head_file import TENSORS, Head, read_head, save_head

C, D = 7, 5
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return samples.make_state(C, D)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.pt"


def assert_holds(head: Head, state: State) -> None:
    read = (head.norm_weight, head.norm_bias, head.weight, head.bias)
    for name, tensor in zip(TENSORS, read, strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float()), name


def refused(path: Path, words: str) -> str:
    with pytest.raises(HeadError, match=words) as caught:
        read_head(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < len(str(path)) + 600
    # torch's own words tell how to load such a file unsafely.
    assert "weights_only" not in message
    return message


def test_a_published_checkpoint_loads_with_all_that_training_left_in_it(path: Path, state: State) -> None:
    torch.save(samples.published_checkpoint(state), path)
    head = read_head(path)
    assert_holds(head, state)
    assert (head.num_cells, head.dim, head.tap) == (C, D, "pooled")
    assert head.encoder_sha256 is head.partition_fingerprint is None
    assert head.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert head.path == str(path)


@pytest.mark.parametrize("part", sorted(samples.published_checkpoint({}).keys() - {"model"}))
def test_each_kind_of_thing_that_training_leaves_loads_by_itself(path: Path, state: State, part: str) -> None:
    torch.save({"model": state, part: samples.published_checkpoint(state)[part]}, path)
    assert_holds(read_head(path), state)


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
        assert_holds(read_head(other), state)


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
    assert_holds(read_head(path), state)


def test_half_precision_weights_are_widened(path: Path, state: State) -> None:
    narrow = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save({"model": narrow}, path)
    assert_holds(read_head(path), narrow)
    save_file(narrow, path.with_suffix(".safetensors"))
    assert_holds(read_head(path.with_suffix(".safetensors")), narrow)


def test_the_old_torch_format_without_a_zip_loads(path: Path, state: State) -> None:
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    assert_holds(read_head(path), state)


@pytest.mark.parametrize("name", ["best.pt", "north.safetensors"])
def test_a_saved_head_comes_back_with_what_was_noted(tmp_path: Path, state: State, name: str) -> None:
    remarks = {"tap": "projected", "encoder_sha256": "ab" * 32, "partition_fingerprint": "cd" * 32}
    remarks |= {"position": "mean", "fusion": "logit"}
    save_head(tmp_path / name, state, remarks=remarks)
    head = read_head(tmp_path / name)
    assert_holds(head, state)
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


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["beside the model", "as the model", "among the tensors", "alone, no zip"])
def test_a_file_that_would_run_a_command_is_refused_and_runs_nothing(path: Path, state: State, where: str) -> None:
    trap = path.with_name("sprung")
    evil = Runs(os.system, f"touch {trap}")
    if where == "alone, no zip":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        beside, model = {"model": state, "x": evil}, {"model": evil}
        among = {"model": state | {"head.2.bias": evil}}
        torch.save({"beside the model": beside, "as the model": model}.get(where, among), path)
    message = refused(path, r"holds posix.system, a type that is not known to be harmless; nothing of the file was")
    assert "Save the weights alone" in message
    assert not trap.exists()
    if where != "alone, no zip":
        # The trap is real: a loader that trusts the file springs it.
        torch.load(path, weights_only=False)
        assert trap.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.nn.Linear(2, 3), r"torch.nn.modules.linear.Linear"),
        (Runs(eval, "1"), r"eval"),
        (Runs(exec, "1"), r"exec"),
        (Runs(__import__, "this"), r"__import__"),
        (Runs(np.load, "x.npy"), r"numpy.load"),
        (range(3), "range"),
        (hashlib.sha256, "_hashlib.openssl_sha256"),
    ],
)
def test_a_type_that_is_not_known_is_named(path: Path, state: State, value: object, named: str) -> None:
    torch.save({"model": state, "x": value}, path)
    refused(path, rf"holds {named}, a type that is not known to be harmless")


class DoctoredDtype:
    """numpy's dtype of Python objects, with the flags of a dtype of plain numbers."""

    def __reduce__(self) -> Any:
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


class BytesAsPointers:
    """An array whose bytes numpy would take for pointers to Python objects."""

    def __reduce__(self) -> Any:
        reconstruct = np.zeros(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), DoctoredDtype(), False, b"\x41" * 8)


def test_no_array_is_built_from_a_pickle_because_bytes_could_pass_for_pointers(path: Path, state: State) -> None:
    torch.save({"model": state, "x": BytesAsPointers(), "y": np.arange(3), "z": np.float64(2)}, path)
    with torch.serialization.safe_globals(HARMLESS_TYPES):
        loaded = torch.load(path, weights_only=True)
    assert not [name for name, value in loaded.items() if isinstance(value, np.ndarray | np.generic)]
    assert_holds(read_head(path), state)


def test_what_other_code_may_load_is_not_widened(path: Path, state: State) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save(samples.published_checkpoint(state), path)
    read_head(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"<!doctype html>\n<p>404", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"],
    ids=["empty", "blank", "html", "git-lfs"],
)
def test_a_text_or_an_empty_file_is_refused(path: Path, suffix: str, content: bytes) -> None:
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    refused(path, "is no whole (PyTorch checkpoint|safetensors file)")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_cut_anywhere_or_with_a_flipped_byte_is_refused_or_whole(path: Path, state: State, suffix: str) -> None:
    path = path.with_suffix(suffix)
    save_head(path, state)
    whole = path.read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:end])
        refused(path, "is no whole")
    for position in range(0, len(whole), max(1, len(whole) // 80)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read_head(path)
        except HeadError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_a_pickle_of_a_newer_protocol_is_refused_without_a_warning(path: Path, state: State) -> None:
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    assert "fetch or copy the file again" in refused(path, "is no whole PyTorch checkpoint")


def test_a_broken_file_in_the_hubs_cache_is_named_where_it_really_lies(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b"
    for name in ("blobs", "snapshots"):
        (folder / name).mkdir(parents=True)
    blob = folder / "blobs" / "0123"
    blob.write_bytes(b"PK cut off")
    for name in ("best.pt", "head.safetensors"):
        (folder / "snapshots" / name).symlink_to(blob)
        assert f"remove {blob.resolve()}, then run" in refused(folder / "snapshots" / name, "is no whole")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list where a head's tensors by name should be"),
        ({"model": torch.ones(3)}, "holds a Tensor where"),
        ({"model": None}, "holds a NoneType where"),
        ({}, "found nothing"),
        ({"model": {}}, "is no LayerNorm and Linear head: .* found nothing"),
        ({"state_dict": {}}, "found state_dict"),
        ({"epoch": 3, 7: 8}, "found 7, epoch"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(path: Path, content: object, words: str) -> None:
    torch.save(content, path)
    refused(path, words)


def without(name: str) -> Callable[[State], State]:
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


def put(name: str, value: Callable[[State], Any]) -> Callable[[State], State]:
    return lambda state: state | {name: value(state)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("head.2.bias"), r"it needs exactly head.0.weight, head.0.bias, head.2.weight, head.2.bias; found"),
        (without("head.0.weight"), r"is no LayerNorm and Linear head"),
        (put("head.4.weight", lambda _: torch.ones(2, 2)), r"is no LayerNorm and Linear head: .*head.4.weight"),
        (put("head.2.bias", lambda _: torch.ones(C + 1)), r"do not fit together: .*head.2.bias \[8\]"),
        (put("head.0.weight", lambda _: torch.ones(1, D)), r"do not fit together: head.0.weight \[1, 5\]"),
        (put("head.0.bias", lambda _: torch.ones(())), r"head.0.bias \[\]"),
        (put("head.2.weight", lambda _: torch.ones(C)), r"head.2.weight \[7\]"),
        (put("head.2.weight", lambda state: state["head.2.weight"].T), r"head.2.weight \[5, 7\]"),
        (put("head.2.weight", lambda _: torch.ones(0, D)), r"head.2.weight \[0, 5\]"),
        (lambda state: state | {"head.2.weight": torch.ones(0, D), "head.2.bias": torch.ones(0)}, r"2.bias \[0\]"),
        (
            lambda state: {name: tensor[..., :0] for name, tensor in state.items()},
            r"do not fit .*head.2.weight \[7, 0\]",
        ),
        (put("head.2.bias", lambda state: state["head.2.bias"] * torch.nan), r"head.2.bias holds NaN or infinite"),
        (put("head.2.bias", lambda _: torch.full((C,), 1e300, dtype=torch.float64)), r"head.2.bias holds NaN or inf"),
        (put("head.2.bias", lambda _: torch.ones(C, dtype=torch.int64)), r"head.2.bias is no floating-point tensor"),
        (put("head.2.bias", lambda _: [0.0] * C), r"head.2.bias is no floating-point tensor"),
        (put("head.2.bias", lambda _: np.ones(C)), r"head.2.bias is no floating-point tensor"),
        (put("head.2.weight", lambda state: state["head.2.weight"].to_sparse()), r"head.2.weight is no floating-point"),
        (put("head.2.weight", lambda state: state["head.2.weight"].to("meta")), r"head.2.weight is no floating-point"),
        (put("module.head.2.bias", lambda state: state["head.2.bias"] + 1), r"holds head.2.bias twice, with and"),
    ],
)
def test_a_head_whose_tensors_do_not_make_one_is_refused(
    path: Path, state: State, change: Callable[[State], State], words: str
) -> None:
    torch.save({"model": change(state)}, path)
    refused(path, words)


def test_misshapen_safetensors_are_refused_alike(tmp_path: Path, state: State) -> None:
    path = tmp_path / "north.safetensors"
    save_file(state | {"head.2.bias": torch.ones(3)}, path)
    refused(path, r"do not fit together: .*head.2.bias \[3\]")


def test_tensors_outside_the_head_are_left_aside_with_a_warning(
    path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": state | {"view_embedding": torch.ones(4), "step": torch.tensor(3)}}, path)
    with caplog.at_level(logging.WARNING):
        assert_holds(read_head(path), state)
    assert "2 tensors beside the head are not used: step, view_embedding" in caplog.text


def test_a_head_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt", r"no such head: .*absent.pt; give a best.pt or .safetensors file with --head")
    refused(tmp_path, r"the head .* cannot be read")
