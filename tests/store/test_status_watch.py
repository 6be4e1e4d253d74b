"""status --watch looks again until all is done, and the last line is one JSON object."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from store_samples import CONFIG, NUM_FINISHED, in_work, make_units, take, write_unit

from geoloc_batch.cli import main
from geoloc_batch.errors import ConfigError
from geoloc_batch.store import standing, watch
from geoloc_batch.store.config import StatusConfig
from geoloc_batch.store.ledger import Ledger

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_watching_reads_each_marker_once_and_ends_when_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, held = in_work(tmp_path / "out", 3, num_done=1)
    read: list[int] = []
    read_one = standing._read
    monkeypatch.setattr(standing, "_read", lambda out, goal: (read.append(goal.unit), read_one(out, goal))[1])
    hands = [held]

    def sleep(seconds: float) -> None:
        assert seconds == 5
        ledger.commit(hands[0], *write_unit(hands.pop(0)))
        if (execution := ledger.acquire()) is not None and execution != "wait":
            hands.append(execution)

    monkeypatch.setattr(time, "sleep", sleep)
    stream = io.StringIO()

    assert watch.show_status(StatusConfig(out=str(ledger.out), watch=5), stream) == 0

    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/3", "2/3", "3/3"]
    assert json.loads(lines[-1])["state"] == "complete"
    assert sorted(read) == [0, 1, 2]
    ledger.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_screen_is_drawn_again_and_ctrl_c_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, _ = in_work(tmp_path / "out", 2)
    sleeps = iter([None, KeyboardInterrupt])

    def sleep(_: float) -> None:
        if (error := next(sleeps)) is not None:
            raise error

    monkeypatch.setattr(time, "sleep", sleep)
    stream = Terminal()

    assert watch.show_status(StatusConfig(out=str(ledger.out), watch=1), stream) == 75
    assert stream.getvalue().count(watch.CLEAR) == 2
    assert json.loads(stream.getvalue().splitlines()[-1])["running"] == 1
    ledger.close()


@pytest.mark.parametrize("flags", [["--watch"], ["--watch", "0.5"], ["--watch=2"], ["--json"], []])
def test_the_command_ends_with_one_json_line(out: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *flags, str(out)]) == 0
    assert main(["status", str(out), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["done"] == NUM_FINISHED
    assert (len(lines) == 2) is (flags == ["--json"])


def test_a_watch_of_no_time_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="--watch must lie between"):
        StatusConfig(out=str(out), watch=0)


def test_the_json_below_the_text_has_the_ranks_of_the_text_and_with_json_alone_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MAX_RANKS", 1)
    first, _ = in_work(tmp_path / "out", 3)
    second = Ledger(first.out, worker="n2-7-r0")
    second.open(CONFIG)
    second.adopt_plan(make_units(3))
    take(second)

    def ranks(**flags: Any) -> list[str]:
        stream = io.StringIO()
        watch.show_status(StatusConfig(out=str(first.out), **flags), stream)
        return [rank["name"] for rank in json.loads(stream.getvalue().splitlines()[-1])["ranks"]]

    assert len(ranks()) == 1
    assert len(ranks(json=True)) == 2
    assert "n2-7-r0" in ranks(json=True)
    for rank in (first, second):
        rank.close()
