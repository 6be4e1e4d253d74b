"""Files that are no heads, broken ones, and ones that would run code: refused, by name and with the remedy."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch
from locate_samples import C, D
from safetensors.torch import save_file
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.locate.harmless import HARMLESS_TYPES
from geoloc_batch.locate.head_file import read_head, save_head

State = dict[str, Tensor]


def refused(path: Path, words: str) -> str:
    with pytest.raises(HeadError, match=words) as caught:
        read_head(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < len(str(path)) + 600
    # torch's own words tell how to load such a file unsafely.
    assert "weights_only" not in message
    return message


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
    samples.assert_holds(read_head(path), state)


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
        samples.assert_holds(read_head(path), state)
    assert "2 tensors beside the head are not used: step, view_embedding" in caplog.text


def test_a_head_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt", r"no such head: .*absent.pt; give a best.pt or .safetensors file with --head")
    refused(tmp_path, r"the head .* cannot be read")
