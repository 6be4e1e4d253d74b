"""Disks that are full: one line with the file, the cause and the remedy, and nothing is lost."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from small_world import tree_bytes
from train_samples import flags_of, make_world, stop_after

from geoloc_batch.cli import main
from geoloc_batch.errors import GeolocError, UserError
from geoloc_batch.train.checkpoint import load_checkpoint, write_whole
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.features import load_features
from geoloc_batch.train.places import read_places

FLAGS = ("--group-by", "spot", "--epochs", 4, "--batch-size", 20)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, out = make_world(tmp_path, num_places=60), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(flags_of(world, out, *FLAGS)) == 75
    before = tree_bytes(out)
    # A device that is always full stands where the next checkpoint is written.
    (out / "_part").mkdir()
    (out / "_part" / "_checkpoint.pt").symlink_to("/dev/full")
    capsys.readouterr()
    assert main(flags_of(world, out, *FLAGS)) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    last = message.splitlines()[-1]
    for words in (
        f"{out / '_checkpoint.pt'} cannot be written",
        "No space left on device",
        "make room",
        "run the same",
    ):
        assert words in last
    assert tree_bytes(out) == before
    state = load_checkpoint(out)
    assert state is not None
    assert state.epoch == 1
    assert main(flags_of(world, out, *FLAGS)) == 0


def test_a_scratch_file_that_finds_no_room_names_folder_size_and_remedy(tmp_path: Path) -> None:
    world = make_world(tmp_path, num_places=60)
    places = read_places(TrainConfig(embeddings=(str(world.emb),), cells=("c",), out="o"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            GeolocError, match=r"take 0.02\d* MB, and .*scratch .*File too large; .*--hold memory"
        ) as told:
            load_features(places, "fused", torch.device("cpu"), hold="disk", scratch=tmp_path / "scratch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # No misuse: exit code 1.
    assert not isinstance(told.value, UserError)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EIO, "mend that")]
)
def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, number: int, remedy: str) -> None:
    path = tmp_path / "a.json"
    write_whole(path, lambda part: part.write_text("first") and None)

    def fail(part: Path) -> None:
        part.write_text("sec")
        raise OSError(number, "No way")

    with pytest.raises(GeolocError, match=rf"a\.json cannot be written: No way; {remedy}"):
        write_whole(path, fail)
    assert path.read_text() == "first"
