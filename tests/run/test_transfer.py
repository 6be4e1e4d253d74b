"""A batch's way through the encoder: on a simulated device that does what it was asked to in any order it may."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoloc_batch.records import Sample, Unit
from geoloc_batch.run.transfer import CudaDevice, DeviceTransfer, Flight, HostTransfer, transfer_for
from geoloc_batch.stream.batch import Batch

BATCH, SIDE, DIM = 3, 2, 4
UNIT = Unit(index=0, kind="shard", source="a.tar")


@dataclass
class Event:
    device: SimulatedDevice
    is_past: bool = False

    def query(self) -> bool:
        return self.is_past

    def synchronize(self) -> None:
        self.device.num_waits += 1
        while not self.is_past:
            assert self.device.step(), "the thread waits for what never happens"


@dataclass
class SimulatedDevice:
    """Streams that run in order, and against each other in any order that the events leave open."""

    seed: int
    num_waits: int = 0
    current: int = 0
    streams: list[deque[Callable[[], bool]]] = field(default_factory=lambda: [deque()])

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def step(self) -> bool:
        """Let one stream that can do its next work; False where none can."""
        for stream in self.random.sample(self.streams, len(self.streams)):
            if stream and stream[0]():
                stream.popleft()
                return True
        return False

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def submit(self, work: Callable[[], object]) -> None:
        def done() -> bool:
            work()
            return True

        self.streams[self.current].append(done)

    def stream(self) -> int:
        self.streams.append(deque())
        return len(self.streams) - 1

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self) -> Event:
        event = Event(self)
        self.submit(lambda: setattr(event, "is_past", True))
        return event

    def follow(self, event: Event) -> None:
        self.streams[self.current].append(lambda: event.is_past)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.submit(lambda: target.copy_(source))

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 99, dtype=dtype)

    pinned = empty


class SimulatedEncoder:
    """Writes every batch's features to the same place, as a replayed CUDA graph does."""

    batch_size, image_size, dim = BATCH, SIDE, DIM

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.output = device, torch.zeros(BATCH, DIM)

    def encode(self, pixels: Tensor) -> Tensor:
        self.device.submit(lambda: self.output.copy_(features_of(pixels)))
        return self.output


def features_of(pixels: Tensor) -> Tensor:
    total = pixels.float().sum(dim=(1, 2, 3))
    return torch.stack([total * power for power in range(1, DIM + 1)], dim=1)


class Ring:
    """The stream's buffers: one that was given back is written to at once, and there are never more than there are."""

    def __init__(self, size: int) -> None:
        self.free = [torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(size)]
        self.given_back: list[int] = []

    def batch(self, number: int, num_photos: int) -> tuple[Batch, Tensor]:
        """A batch, and the features that it should give."""
        pixels = self.free.pop()
        pixels.copy_(torch.randint(1, 256, pixels.shape, generator=torch.Generator().manual_seed(number)))
        samples = tuple(Sample(UNIT, "a.tar", row, f"{number}-{row}", b"") for row in range(num_photos))

        def give_back() -> None:
            if number not in self.given_back:
                self.given_back.append(number)
                pixels.fill_(0)
                self.free.append(pixels)

        return Batch(pixels, samples, give_back), features_of(pixels)[:num_photos]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, BATCH), st.integers(0, 9)), min_size=1, max_size=12))
def test_every_batch_gives_its_own_features_whatever_order_the_streams_run_in(
    seed: int, plan: list[tuple[int, int]]
) -> None:
    device, ring = SimulatedDevice(seed), Ring(4)
    transfer = DeviceTransfer(SimulatedEncoder(device), device)  # type: ignore[arg-type]
    started: deque[tuple[Flight, Tensor]] = deque()
    num_landed = 0

    def land() -> None:
        nonlocal num_landed
        flight, expected = started.popleft()
        flight.wait()
        with flight.landed() as features:
            assert device.current != 0, "locators must not stand behind batches that were started since"
            # Whatever the device goes on to do meanwhile.
            device.run(20)
            np.testing.assert_array_equal(features.host_BD, expected.numpy())
            torch.testing.assert_close(features.device_BD, expected, rtol=0, atol=0)
        num_landed += 1
        assert num_landed - 1 in ring.given_back

    for number, (num_photos, steps) in enumerate(plan):
        batch, expected = ring.batch(number, num_photos)
        started.append((transfer.start(batch), expected))
        device.run(steps)
        # The lane holds one batch, two wait for it, one is being put there.
        while len(started) == 4 or not ring.free:
            land()
    while started:
        land()
    assert device.num_waits == len(plan), "one event a batch is waited for"
    assert transfer.num_buffers <= 4
    assert sorted(ring.given_back) == list(range(len(plan)))


def test_nothing_is_waited_for_while_batches_are_started() -> None:
    device, ring = SimulatedDevice(0), Ring(4)
    transfer = DeviceTransfer(SimulatedEncoder(device), device)  # type: ignore[arg-type]
    for number in range(4):
        transfer.start(ring.batch(number, BATCH)[0])
    assert device.num_waits == 0
    assert ring.given_back == []


def test_a_buffer_goes_back_to_the_decoders_when_it_was_copied_not_when_it_was_encoded() -> None:
    device, ring = SimulatedDevice(0), Ring(4)
    transfer = DeviceTransfer(SimulatedEncoder(device), device)  # type: ignore[arg-type]
    transfer.start(ring.batch(0, BATCH)[0])
    while device.streams[1]:
        device.streams[1].popleft()()
    assert device.streams[0], "the encoder has not begun"
    transfer.start(ring.batch(1, BATCH)[0])
    assert ring.given_back == [0]


def test_buffers_are_used_again_once_their_features_were_read() -> None:
    device, ring = SimulatedDevice(1), Ring(2)
    transfer = DeviceTransfer(SimulatedEncoder(device), device)  # type: ignore[arg-type]
    for number in range(20):
        flight = transfer.start(ring.batch(number, 1)[0])
        flight.wait()
        with flight.landed():
            pass
    assert transfer.num_buffers == 1


def test_buffers_come_back_from_a_lane_that_fails() -> None:
    device, ring = SimulatedDevice(1), Ring(1)
    transfer = DeviceTransfer(SimulatedEncoder(device), device)  # type: ignore[arg-type]
    flight = transfer.start(ring.batch(0, 1)[0])
    flight.wait()
    with pytest.raises(ZeroDivisionError), flight.landed():
        raise ZeroDivisionError
    transfer.start(ring.batch(1, 1)[0])
    assert transfer.num_buffers == 1


def test_on_a_cpu_the_features_are_there_at_once_and_so_is_the_buffer() -> None:
    ring = Ring(1)
    encoder: Any = SimpleNamespace(encode=features_of, device=torch.device("cpu"))
    batch, expected = ring.batch(0, 2)
    flight = transfer_for(encoder).start(batch)
    assert isinstance(transfer_for(encoder), HostTransfer)
    assert ring.given_back == [0]
    flight.wait()
    with flight.landed() as features:
        np.testing.assert_array_equal(features.host_BD, expected.numpy())
        torch.testing.assert_close(features.device_BD, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_cuda_every_batch_gives_the_features_of_the_encoder_alone(precision: str) -> None:
    from geoloc_batch.model.encoder import load_encoder

    encoder = load_encoder("demo", precision=precision, batch_size=5, compile="off", device="cuda")  # type: ignore[arg-type]
    transfer = transfer_for(encoder)
    assert isinstance(transfer, DeviceTransfer)
    ring = [
        torch.empty((5, 56, 56, 3), dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2).random_(0, 256)
        for _ in range(4)
    ]
    expected = [encoder.encode(pixels).cpu() for pixels in ring]
    samples = tuple(Sample(UNIT, "a.tar", row, str(row), b"") for row in range(4))
    started: deque[tuple[int, Flight]] = deque()
    for number in range(40):
        started.append((number % 4, transfer.start(Batch(ring[number % 4], samples))))
        while len(started) > (3 if number < 39 else 0):
            which, flight = started.popleft()
            flight.wait()
            with flight.landed() as features:
                np.testing.assert_array_equal(features.host_BD, expected[which][:4].numpy())
                torch.testing.assert_close(features.device_BD.cpu(), expected[which][:4], rtol=0, atol=0)
    assert transfer.num_buffers <= 4


def test_the_simulated_device_has_what_cuda_is_asked_for() -> None:
    asked = {name for name in vars(CudaDevice) if not name.startswith("_")}
    assert asked <= set(dir(SimulatedDevice))
