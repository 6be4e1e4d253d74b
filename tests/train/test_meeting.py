"""Where ranks meet, what one of them has of a batch, and how many there are."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from geoloc_batch.errors import ConfigError, GeolocError, OutputError, StopRequested, UserError
from geoloc_batch.run.workers import num_together
from geoloc_batch.train import meeting
from geoloc_batch.train.features import MAX_SHARE, _fits
from geoloc_batch.train.group import Group, code_of
from geoloc_batch.train.meeting import Lifeline, address, first_node

CPU = torch.device("cpu")
STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_STEP_NUM_NODES": "3"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", *STEP, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("a,b[1-2]", "a"),
        ("rack3-node[9,11]-ib", "rack3-node9-ib"),
        ("c[1-2],c[7-8]", "c1"),
    ],
)
def test_the_first_node_of_a_list_is_where_ranks_meet(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_under_srun_the_address_follows_from_the_job_and_what_is_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    host, port = address()
    assert host == "gpu07"
    assert 15_000 <= port < 32_000
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert address() == (host, port + 1)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert address()[0] == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("MASTER_PORT", "29400")
    assert address() == ("10.0.0.7", 29400)


def test_without_an_address_the_remedy_is_told() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is '' .* accelerate launch"):
        address()


def test_a_batch_script_waits_for_nobody_whatever_tasks_its_job_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert num_together() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert num_together() == 8
    # torchrun within a step.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert num_together() == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [0, 1, 6, 7, 20])
def test_parts_cover_all_rows_in_their_order_and_differ_by_one_at_most(num_rows: int, size: int) -> None:
    parts = [np.arange(num_rows)[Group(rank=rank, size=size).part(num_rows)] for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(num_rows))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoloc_batch.train.features.free_bytes", lambda device: 1000)
    assert _fits(int(1000 * MAX_SHARE), CPU, Group())
    assert not _fits(int(1000 * MAX_SHARE), CPU, Group(size=4, num_on_machine=2))
    assert _fits(int(500 * MAX_SHARE), CPU, Group(size=4, num_on_machine=2))
    on_gpu = Group(size=4, num_on_machine=2, num_on_device=2, device=torch.device("cuda"))
    assert not _fits(int(500 * MAX_SHARE) + 1, on_gpu.device, on_gpu)


@pytest.mark.parametrize(
    ("error", "code"), [(OutputError(""), 2), (GeolocError(""), 1), (RuntimeError(), 1), (StopRequested(), 75)]
)
def test_the_others_hear_how_a_rank_ended(error: BaseException, code: int) -> None:
    here, there = socket.socketpair()
    with Lifeline([here]) as lifeline:
        other = Lifeline([there])
        other.code = code_of(error)
        with other:
            pass
        assert lifeline.code_of_lost() == code
        with pytest.raises((UserError, GeolocError, StopRequested)) as told:
            Group(size=2, lifeline=lifeline)._give_up(RuntimeError("connection closed"))
        assert code_of(told.value) == code


def test_strangers_at_the_port_and_a_late_rank_do_not_end_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_KNOCK_S", 0.2)
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor() as pool:
        # It comes first and hears of nothing yet.
        other = pool.submit(meeting._connections, store, "127.0.0.1", 1, 2)
        time.sleep(0.3)
        assert not other.done()
        store_of_strangers = torch.distributed.HashStore()
        first = pool.submit(meeting._connections, store_of_strangers, "", 0, 2)
        port = int(meeting.told(store_of_strangers, "lifeline").split()[0])
        silent = socket.create_connection(("127.0.0.1", port))
        with socket.create_connection(("127.0.0.1", port)) as rude:
            # Closed with a reset.
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with socket.create_connection(("127.0.0.1", port)) as wrong:
            wrong.sendall(b"x" * 32)
        store.set("lifeline", store_of_strangers.get("lifeline"))
        here, there = [one for ranks in (first, other) for one in ranks.result(20)]
        here.sendall(b"!")
        assert there.recv(1) == b"!"
        for connection in (here, there, silent):
            connection.close()


def test_what_nobody_tells_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING_S", 0.2)
    with pytest.raises(RuntimeError, match="nothing was heard of 'lifeline'"):
        meeting.told(torch.distributed.HashStore(), "lifeline")


def test_a_rank_that_closes_without_a_word_is_lost_and_one_that_ends_in_order_is_not() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    with Lifeline([here for here, _ in pairs]) as lifeline:
        with Lifeline([pairs[0][1]]):
            pass
        time.sleep(0.3)
        assert not lifeline._is_lost.is_set()
        pairs[1][1].close()
        assert lifeline._is_lost.wait(10)
        assert lifeline.code_of_lost() == 75
