"""A lane's order, its backpressure and its failures."""

from __future__ import annotations

import threading
import time

import pytest

from geoloc_batch.run.lanes import Lane


def test_items_are_done_in_order_and_close_waits_for_them() -> None:
    done: list[int] = []

    def slow(item: int) -> None:
        time.sleep(0.001)
        done.append(item)

    lane = Lane("slow", slow, depth=2)
    for item in range(20):
        lane.put(item)
    lane.close()
    assert done == list(range(20))


def test_a_full_lane_holds_the_caller_back() -> None:
    gate = threading.Event()
    lane: Lane[int] = Lane("gated", lambda _: gate.wait(10) and None, depth=2)
    for item in range(3):  # one at work, two waiting
        lane.put(item)
    blocked = threading.Thread(target=lane.put, args=(3,))
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive()
    gate.set()
    blocked.join(10)
    assert not blocked.is_alive()
    lane.close()


def test_a_failure_reaches_the_caller_and_nobody_hangs() -> None:
    def fail(_: int) -> None:
        raise RuntimeError("no room")

    lane = Lane("failing", fail, depth=1)

    def put_many() -> None:
        for item in range(1000):
            lane.put(item)

    with pytest.raises(RuntimeError, match="no room"):
        put_many()
    assert lane.failed
    with pytest.raises(RuntimeError, match="no room"):
        lane.close()
    lane.close(quiet=True)


def test_a_lane_tells_how_many_items_wait_now_and_on_average() -> None:
    gate, is_at_work = threading.Event(), threading.Event()

    def work(_: int) -> None:
        is_at_work.set()
        gate.wait(10)

    lane: Lane[int] = Lane("gated", work, depth=3)
    assert lane.depth() == (0, 0.0)
    lane.put(0)
    assert is_at_work.wait(10)
    lane.put(1)
    lane.put(2)
    time.sleep(0.2)
    now, mean = lane.depth()
    assert now == 2
    assert 1.0 < mean <= 2.0
    gate.set()
    lane.close()
    assert lane.depth()[0] == 0
