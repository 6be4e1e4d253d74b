"""What a run makes of damaged shards, through the command line: the rows, errors and exit code that are owed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from reliability_samples import DAMAGES, SOUND_KEYS, Damage, as_ordinary_user, members, sound, tar_bytes

from geoloc_batch.cli import main
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.store.marker import Marker, standing_marker

LONGEST_S = 60
BATCH = 4
MANY = 400
MAX_HUGE_MB = 100


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """A run that hangs fails. The signal comes again and again, for the first may fall into a clean-up."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"the run hangs for {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Outcome:
    """A run of `geoloc embed` on a damaged shard and a sound one, and all it left behind."""

    def __init__(self, shards: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = out
        capsys.readouterr()
        self.code = main(["embed", str(shards), "--out", str(out), "--encoder", "demo", "--batch-size", str(BATCH)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        self.summary: dict[str, Any] = json.loads(said.out.splitlines()[-1])
        verified = main(["verify", str(out)])
        said = capsys.readouterr()
        assert verified == 0, said.err
        self.proof: dict[str, Any] = json.loads(said.out.splitlines()[-1])
        assert self.summary["samples"] == self.proof["samples"] == self.proof["rows"] + self.proof["errors"]
        assert self.summary["unit_errors"] == sum(self.marker(unit).counts.unit_error is not None for unit in (0, 1))

    def marker(self, unit: int) -> Marker:
        marker = standing_marker(self.out, unit)
        assert marker is not None
        return marker

    def table(self, tree: str, unit: int = 0) -> list[dict[str, Any]]:
        path = self.out / tree / f"{tree}_{unit:06d}.parquet"
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist() if path.exists() else []
        return rows

    def keys(self, unit: int = 0) -> list[str]:
        rows = self.table("metadata", unit)
        assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
        return [row["key"] for row in rows]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with a sound shard in it, the second of two."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "b.tar").write_bytes(tar_bytes(members(["s0", "s1", "s2"])))
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_each_damage_gives_the_rows_errors_and_exit_code_of_the_table(
    damage: Damage, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = damage.make()
    (shards / "a.tar").write_bytes(data)
    run = Outcome(shards, tmp_path / "out", capsys)

    assert run.keys() == damage.rows
    errors = run.table("errors")
    told = [(error["key"], error["row"], error["stage"], error["retryable"]) for error in errors]
    assert told == list(damage.errors)
    assert all(damage.error_text in error["message"] for error in errors[:1])

    counts = run.marker(0).counts
    assert (counts.unit_error is None) == (damage.cut_at is None)
    if damage.cut_at is not None and counts.unit_error is not None:
        offset = damage.cut_at(data)
        assert (counts.unit_error.offset, counts.unit_error.retryable) == (offset, damage.is_unit_retryable)
        # Of a compressed shard nobody knows how much is left.
        assert counts.unit_error.bytes_unread == (None if damage.name.startswith("gzip") else len(data) - offset)
        assert damage.unit_text in counts.unit_error.message
    told_warnings = [warning for warning in counts.warnings if warning != "it holds no photo"]
    assert len(told_warnings) == bool(damage.warning)
    assert all(damage.warning in warning for warning in told_warnings)

    assert run.keys(unit=1) == ["s0", "s1", "s2"]
    assert run.code == damage.code


def peak_mb(*, reset: bool = False) -> float:
    """The most memory that this process has held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize("name", ["huge-jpg", "huge-png"])
def test_a_photo_of_30000_x_30000_is_refused_without_filling_the_memory(
    name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "a.tar").write_bytes(sound())
    Outcome(shards, tmp_path / "sound", capsys)
    (shards / "a.tar").write_bytes(next(damage.make() for damage in DAMAGES if damage.name == name))
    before_mb = peak_mb(reset=True)
    Outcome(shards, tmp_path / "out", capsys)
    assert peak_mb() - before_mb < MAX_HUGE_MB


def test_an_unreadable_shard_is_a_unit_error(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "a.tar").write_bytes(sound())
    (shards / "a.tar").chmod(0)
    with as_ordinary_user():
        run = Outcome(shards, tmp_path / "out", capsys)
    error = run.marker(0).counts.unit_error
    assert error is not None
    assert (error.offset, error.bytes_unread, error.retryable) == (-1, len(sound()), True)
    assert "Permission denied" in error.message
    assert (run.code, run.keys(), run.keys(unit=1)) == (3, [], ["s0", "s1", "s2"])


@pytest.fixture
def at_first_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Something that happens once, when the first batch reaches the encoder."""

    def arrange(event: Callable[[], object]) -> None:
        encode, pending = Encoder.encode, [event]

        def watched(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
            if pending:
                pending.pop()()
            return encode(self, pixels)

        monkeypatch.setattr(Encoder, "encode", watched)

    return arrange


def test_a_shard_truncated_while_it_is_read_keeps_the_photos_read_so_far(
    shards: Path, tmp_path: Path, at_first_batch: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"p{row}" for row in range(MANY)]
    whole = tar_bytes(members(names))
    (shards / "a.tar").write_bytes(whole)
    at_first_batch(lambda: os.truncate(shards / "a.tar", 100))
    run = Outcome(shards, tmp_path / "out", capsys)
    error = run.marker(0).counts.unit_error
    assert error is not None
    assert error.retryable
    assert f"shrank from {len(whole)} to 100 bytes" in error.message
    keys = run.keys()
    assert 0 < len(keys) < MANY
    assert keys == names[: len(keys)]
    assert run.table("errors") == []
    assert (run.code, run.keys(unit=1)) == (3, ["s0", "s1", "s2"])


def test_a_shard_replaced_while_it_is_read_gives_the_rows_of_the_file_that_was_opened(
    shards: Path, tmp_path: Path, at_first_batch: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"p{row}" for row in range(MANY)]
    (shards / "a.tar").write_bytes(tar_bytes(members(names)))
    (tmp_path / "new.tar").write_bytes(sound())
    at_first_batch(lambda: os.replace(tmp_path / "new.tar", shards / "a.tar"))
    run = Outcome(shards, tmp_path / "out", capsys)
    assert (run.code, run.keys(), run.keys(unit=1)) == (0, names, ["s0", "s1", "s2"])


def test_a_shard_replaced_before_it_is_opened_gives_the_rows_of_the_new_file(
    shards: Path, tmp_path: Path, at_first_batch: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "a.tar").write_bytes(sound())
    # The larger shard is read first, and far from its end when its first batch is through.
    (shards / "b.tar").write_bytes(tar_bytes(members([f"s{row}" for row in range(MANY)])))
    (tmp_path / "new.tar").write_bytes(tar_bytes(members(["n0", "n1"])))
    at_first_batch(lambda: os.replace(tmp_path / "new.tar", shards / "a.tar"))
    run = Outcome(shards, tmp_path / "out", capsys)
    assert (run.code, run.keys(), len(run.keys(unit=1))) == (0, ["n0", "n1"], MANY)
    (warning,) = run.marker(0).counts.warnings
    assert f"had {len(sound())} bytes when it was planned" in warning


def test_a_shard_that_vanishes_before_it_is_opened_is_a_unit_error(
    shards: Path, tmp_path: Path, at_first_batch: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "a.tar").write_bytes(sound())
    (shards / "b.tar").write_bytes(tar_bytes(members([f"s{row}" for row in range(MANY)])))
    at_first_batch((shards / "a.tar").unlink)
    run = Outcome(shards, tmp_path / "out", capsys)
    error = run.marker(0).counts.unit_error
    assert error is not None
    assert (error.offset, error.retryable) == (-1, True)
    assert "No such file" in error.message
    assert (run.code, run.keys(), len(run.keys(unit=1))) == (3, [], MANY)


def test_a_shard_that_was_replaced_after_its_unit_was_done_keeps_its_rows_and_is_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (shards / "a.tar").write_bytes(sound())
    before = Outcome(shards, tmp_path / "out", capsys)
    (shards / "a.tar").write_bytes(tar_bytes(members(["n0", "n1"])))
    caplog.clear()
    after = Outcome(shards, tmp_path / "out", capsys)
    assert (after.code, after.keys()) == (0, before.keys())
    assert "its rows stay" in caplog.text


def test_a_shard_that_was_replaced_by_a_sound_one_is_made_again_by_a_retry(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "a.tar").write_bytes(sound()[:-9000])
    before = Outcome(shards, tmp_path / "out", capsys)
    assert before.code == 3
    (shards / "a.tar").write_bytes(sound())
    assert main(["retry", str(tmp_path / "out"), "--unit", "0"]) == 0
    after = Outcome(shards, tmp_path / "out", capsys)
    assert (after.code, after.keys()) == (0, SOUND_KEYS)
