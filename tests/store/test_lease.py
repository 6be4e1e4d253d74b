"""When a lease counts as live."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from geoloc_batch.store.files import OsFiles, process_name, process_state
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.lease import Lease, Leases, parse_lease_name, read_lease

SECOND_NS = 1_000_000_000


class Clocks(OsFiles):
    """A file server and a monotonic clock that are set by hand."""

    def __init__(self) -> None:
        self.server_ns = 10_000 * SECOND_NS
        self.own_s = 0.0

    def touch(self, path: Path) -> None:
        os.utime(path, ns=(self.server_ns, self.server_ns))

    def monotonic(self) -> float:
        return self.own_s


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def seen_by_another(files: Clocks, folder: Path) -> tuple[Leases, Lease]:
    """A lease of another, live rank on unit 7, touched now; and how we see the folder."""
    theirs = Leases(files, folder, beat_s=1000, stale_beats=4)
    assert theirs.take(Goal(7), 1, "theirs")
    theirs.beat()
    assert theirs._stop_beating is not None
    theirs._stop_beating()
    ours = Leases(files, folder, beat_s=15, stale_beats=4)
    ours.server_now_ns()
    return ours, ours.all()[Goal(7)][0]


def test_a_lease_is_stale_after_four_missed_beats_of_the_servers_clock(tmp_path: Path, clocks: Clocks) -> None:
    ours, lease = seen_by_another(clocks, tmp_path)

    clocks.server_ns += 60 * SECOND_NS
    assert ours.is_live(lease, ours.server_now_ns())
    clocks.server_ns += SECOND_NS
    assert not ours.is_live(lease, ours.server_now_ns())


def test_a_server_clock_that_was_set_back_does_not_keep_the_dead_alive(tmp_path: Path, clocks: Clocks) -> None:
    ours, lease = seen_by_another(clocks, tmp_path)
    clocks.server_ns -= 5000 * SECOND_NS

    assert ours.is_live(lease, ours.server_now_ns())
    clocks.own_s = 59
    assert ours.is_live(lease, ours.server_now_ns())
    clocks.own_s = 61
    assert not ours.is_live(lease, ours.server_now_ns())


def test_a_lease_that_moves_stays_live_whatever_the_clocks_say(tmp_path: Path, clocks: Clocks) -> None:
    ours, lease = seen_by_another(clocks, tmp_path)
    clocks.server_ns -= 5000 * SECOND_NS
    for _ in range(10):
        clocks.own_s += 40
        clocks.server_ns += SECOND_NS
        lease = dataclasses.replace(lease, mtime_ns=clocks.server_ns)
        assert ours.is_live(lease, ours.server_now_ns())


def test_who_stands_still_in_the_midst_of_a_look_calls_nobody_dead_for_it(tmp_path: Path, clocks: Clocks) -> None:
    ours, lease = seen_by_another(clocks, tmp_path)
    assert ours.is_live(lease, ours.server_now_ns())
    clocks.own_s += 5

    now_ns = ours.server_now_ns()
    (lease,) = ours.all()[Goal(7)]
    clocks.own_s += 70

    assert ours.is_live(lease, now_ns)
    assert not ours.is_live(lease, ours.server_now_ns())


def test_a_lease_of_a_process_that_has_ended_is_dead_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from geoloc_batch.store.files import OsFiles\n"
        "from geoloc_batch.store.goal import Goal\n"
        "from geoloc_batch.store.lease import Leases\n"
        "Leases(OsFiles(), Path(sys.argv[1]), beat_s=15, stale_beats=4).take(Goal(3), 1, 'token')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    ours = Leases(OsFiles(), tmp_path, beat_s=15, stale_beats=4)

    (lease,) = ours.all()[Goal(3)]

    assert lease.owner is not None
    assert lease.owner.pid != os.getpid()
    assert not ours.is_live(lease, ours.server_now_ns())


@pytest.mark.parametrize("change", [{"boot": "another machine"}, {"namespace": "pid:[1]"}, {"boot": ""}])
def test_a_process_that_cannot_be_seen_from_here_is_never_called_gone(change: dict[str, str]) -> None:
    files = OsFiles()
    elsewhere = dataclasses.replace(files.owner(), pid=2**22 + 1, **change)

    assert not files.is_gone(elsewhere)
    assert files.is_gone(dataclasses.replace(files.owner(), pid=2**22 + 1))


def test_a_live_process_that_proc_does_not_know_by_its_number_is_never_called_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As in a container that counts its own processes and was given the machine's /proc.
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    owner = OsFiles().owner()
    companion = dataclasses.replace(owner, pid=2**22 + 2)

    assert not OsFiles().is_gone(owner)
    assert not OsFiles().is_gone(companion)


@pytest.mark.parametrize(
    ("namespace", "name"), [("pid:[4026531836]", "2"), ("pid:[4026532178]", "2.4026532178"), (None, "2")]
)
def test_processes_of_containers_that_count_alike_have_names_of_their_own(
    namespace: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def readlink(path: str) -> str:
        assert path == "/proc/self/ns/pid"
        if namespace is None:
            raise FileNotFoundError(path)
        return namespace

    monkeypatch.setattr(os, "getpid", lambda: 2)
    monkeypatch.setattr(os, "readlink", readlink)
    assert process_name() == name


def test_a_pid_that_was_given_to_another_process_since_is_a_process_gone() -> None:
    files = OsFiles()
    owner = files.owner()

    assert not files.is_gone(owner)
    assert files.is_gone(dataclasses.replace(owner, started=owner.started - 1))


def test_a_killed_process_that_nobody_has_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = process_state(process.pid)
    assert state is not None
    owner = dataclasses.replace(OsFiles().owner(), pid=process.pid, started=state[1])
    assert not OsFiles().is_gone(owner)

    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert OsFiles().is_gone(owner)
    process.communicate()


@pytest.mark.parametrize("content", [b"", b'{"token": "a', b"[]", b'{"token": "a"}'])
def test_a_half_written_lease_is_live_until_its_time_is_up(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "000005.1").write_bytes(content)
    ours = Leases(OsFiles(), tmp_path, beat_s=15, stale_beats=4)
    lease = read_lease(tmp_path / "000005.1", ours.server_now_ns())

    assert (lease.token, lease.owner) == ("", None)
    assert ours.is_live(lease, lease.mtime_ns + 59 * SECOND_NS)
    assert not ours.is_live(lease, lease.mtime_ns + 61 * SECOND_NS)


def test_a_slot_is_taken_once(tmp_path: Path) -> None:
    first, second = (Leases(OsFiles(), tmp_path, beat_s=15, stale_beats=4) for _ in range(2))

    assert first.take(Goal(1), 1, "a") is not None
    assert second.take(Goal(1), 1, "b") is None
    assert second.take(Goal(1, 1), 1, "of a retry") is not None
    first.give_back("a")
    assert second.take(Goal(1), 1, "c") is not None
    first.close()
    second.close()


def test_other_names_in_the_folder_are_no_leases() -> None:
    assert parse_lease_name("000012.2") == (Goal(12), 2)
    assert parse_lease_name("1000000.1") == (Goal(1_000_000), 1)
    assert parse_lease_name("000012r3.2") == (Goal(12, 3), 2)
    others = ("clock.1f", "000012", ".nfs0001", "000012.x", "000012r.1", "000012r0.1", "r1.1", "000012r1")
    assert [parse_lease_name(name) for name in others] == [None] * len(others)
