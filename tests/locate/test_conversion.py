"""`geoloc heads convert`: what is kept, what is refused, and what --trust executes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import locate_samples as samples
import pytest
import torch

from geoloc_batch.cli import main
from geoloc_batch.locate.head_file import TENSORS, read_head, save_head

REMARKS = {"tap": "projected", "encoder_sha256": "ab" * 32, "partition_fingerprint": "cd" * 32}
REMARKS |= {"position": "mean", "fusion": "logit"}


class Trap:
    """Pickles as a command that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def convert(*arguments: object) -> int:
    return main(["heads", "convert", *map(str, arguments)])


def test_a_head_goes_to_safetensors_and_back_with_all_that_is_known_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = samples.make_state(7, 5)
    source, there, back = tmp_path / "a" / "best.pt", tmp_path / "b.safetensors", tmp_path / "back.pt"
    source.parent.mkdir()
    torch.save(samples.published_checkpoint(state), source)
    # What only the head.json beside the source says goes along.
    samples.write_remarks(source.parent, {**REMARKS, "metrics": {"balscore": 63.1}})
    assert convert(source, there) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["num_cells"], told["dim"], told["remarks"]) == (7, 5, REMARKS)
    assert told["sha256"] == hashlib.sha256(there.read_bytes()).hexdigest()
    assert convert(there, back) == 0
    for path in (there, back):
        head = read_head(path)
        assert head.remarks == REMARKS
        assert all(torch.equal(head.state[name], state[name]) for name in TENSORS)
    loaded = torch.load(back, weights_only=True)
    assert sorted(loaded) == ["head", "model"]
    assert list(loaded["model"]) == list(TENSORS)


@pytest.mark.parametrize("out", ["x.safetensors", "x.pt"])
def test_code_in_a_file_is_executed_only_where_it_is_trusted_and_said_loudly(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = samples.make_state(7, 5)
    trap, source = tmp_path / "sprung", tmp_path / "nasty.pt"
    torch.save({"model": state, "head": {"position": "mean"}, "x": Trap(trap)}, source)
    assert convert(source, tmp_path / out) == 2
    message = capsys.readouterr().err
    assert "holds posix.system, a type that is not known to be harmless; nothing of the file was executed" in message
    assert "--trust" in message
    assert not trap.exists()
    assert not (tmp_path / out).exists()
    assert convert(source, tmp_path / out, "--trust") == 0
    assert trap.exists()
    assert f"EXECUTING the code in {source}" in caplog.text
    trap.unlink()
    # What was written holds neither the code nor anything else of the source.
    head = read_head(tmp_path / out)
    assert (head.position, torch.equal(head.weight, state["head.2.weight"])) == ("mean", True)
    if out.endswith(".pt"):
        assert sorted(torch.load(tmp_path / out, weights_only=False)) == ["head", "model"]
    assert not trap.exists()


def test_a_harmless_file_is_not_executed_although_it_is_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = samples.write_head(tmp_path)
    assert convert(source, tmp_path / "x.safetensors", "--trust") == 0
    assert "EXECUTING" not in caplog.text


def test_a_whole_module_is_unpacked_where_it_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = torch.nn.Module()
    module.head = torch.nn.Sequential(torch.nn.LayerNorm(5), torch.nn.Dropout(0.3), torch.nn.Linear(5, 7))
    torch.save(module, tmp_path / "whole.pt")
    assert convert(tmp_path / "whole.pt", tmp_path / "x.pt") == 2
    assert convert(tmp_path / "whole.pt", tmp_path / "x.pt", "--trust") == 0
    assert torch.equal(read_head(tmp_path / "x.pt").weight, module.head[2].weight)
    (tmp_path / "broken.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-400])
    capsys.readouterr()
    assert convert(tmp_path / "broken.pt", tmp_path / "y.pt", "--trust") == 2
    assert "broken.pt cannot be loaded even when it is trusted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("best.pt", "is the source itself"),
        ("link.pt", "is the source itself"),
        ("x.txt", "must end in .safetensors"),
        ("none/x.pt", "does not exist; make"),
        ("folder.pt", "is a folder"),
        ("other/x.pt", "says of its head fusion logit, which"),
    ],
)
def test_an_out_that_cannot_be_is_refused_and_nothing_is_changed(
    tmp_path: Path, out: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "best.pt"
    save_head(source, samples.make_state(7, 5), remarks={"tap": "pooled"})
    (tmp_path / "link.pt").symlink_to(source)
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "other").mkdir()
    samples.write_remarks(tmp_path / "other", {"fusion": "logit"})
    before = source.read_bytes()
    files = sorted(tmp_path.rglob("*"))
    assert convert(source, tmp_path / out) == 2
    assert words in capsys.readouterr().err
    assert source.read_bytes() == before
    assert sorted(tmp_path.rglob("*")) == files


def test_sources_that_are_no_heads_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, words in (("absent.pt", "no such head"), ("eu-nutz3", "did you mean eu-nuts3?")):
        assert convert(source, tmp_path / "x.pt") == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        convert("", tmp_path / "x.pt")
    assert stop.value.code == 2
    assert "SOURCE must not be empty" in capsys.readouterr().err
