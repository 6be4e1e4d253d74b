"""Transfer: a batch's way into the encoder, and its features' way back.

On CUDA nobody waits for the device but by one event a batch, and that in the lane that takes the features:

    calling thread   ring of pinned pixels -> [copy stream] -> device -> [compute stream] encode -> pinned features
    lane             waits for the features' event, reads them, locates on a stream of its own, gives the buffers back

While one batch is computed the next one's pixels are copied and the one after is decoded. A batch has device and host
buffers of its own until its features were read, so that no copy has to wait for another batch; the lane's short queue
bounds how many there are. On a CPU the features are there when `start` returns.

Shape letters: B batch, S image side, D features
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.model.encoder import Encoder
from geoloc_batch.stream.batch import Batch


@dataclass(frozen=True, slots=True)
class Features:
    """Features of the real photos of one batch: padding is dropped."""

    host_BD: NDArray[np.float32]
    """[B, D] as the tap gives them, never normalised."""
    device_BD: Tensor
    """The same on the run's device, for the locators."""


class Flight(Protocol):
    """The features of one batch, under way."""

    def wait(self) -> None:
        """Return when the features are there."""
        ...

    def landed(self) -> AbstractContextManager[Features]:
        """The features, good inside the `with` alone: their buffers are used again. To be entered once, after wait."""
        ...


class Transfer(Protocol):
    """Brings batches through one encoder."""

    def start(self, batch: Batch) -> Flight:
        """Encode a batch; it is given back to the stream as soon as its pixels have been read."""
        ...


def transfer_for(encoder: Encoder) -> Transfer:
    """The transfer for an encoder's device."""
    if encoder.device.type == "cuda":
        return DeviceTransfer(encoder, CudaDevice(encoder.device))
    return HostTransfer(encoder)


class Landed:
    """Features that are there already."""

    def __init__(self, features: Features) -> None:
        self._features = features

    def wait(self) -> None:
        """Nothing to wait for."""

    @contextmanager
    def landed(self) -> Iterator[Features]:
        """The features; they stay good."""
        yield self._features


class HostTransfer:
    """The transfer on a CPU: the calling thread computes."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def start(self, batch: Batch) -> Flight:
        """See Transfer; returns when the features are there."""
        features_BD = self._encoder.encode(batch.pixels)[: len(batch.samples)]
        batch.release()
        return Landed(Features(features_BD.cpu().numpy(), features_BD))


class CudaDevice:
    """What a DeviceTransfer asks of CUDA. Tests put a simulated device in its place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> Any:
        """A stream beside that of the calling thread."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside, the calling thread's work goes to `stream`."""
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def record(self) -> Any:
        """An event on the calling thread's stream. Who synchronises with it sleeps: decoders need the CPU."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def follow(self, event: Any) -> None:
        """What the calling thread's stream is given from here on comes after `event`. The thread does not wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy in the order of the calling thread's stream. The thread does not wait."""
        target.copy_(source, non_blocking=True)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the device."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A page-locked tensor on the host: others cannot be copied to without waiting."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Buffers:
    """What one batch needs on its way."""

    pixels_B3SS: Tensor
    """On the device, channels last in memory."""
    device_BD: Tensor
    host_BD: Tensor
    """Pinned."""


class DeviceTransfer:
    """The transfer on CUDA. `start` is called by one thread; flights may land in another.

    Args:
        encoder: computes on the stream that is current where `start` is called.
        device: CUDA, or a simulated device.
    """

    def __init__(self, encoder: Encoder, device: CudaDevice) -> None:
        self._encoder, self._device = encoder, device
        self._copies, self._locators = device.stream(), device.stream()
        self._free: deque[_Buffers] = deque()
        self._copying: deque[tuple[Any, Batch]] = deque()
        self.num_buffers = 0
        """Sets of buffers that were made: as many as batches were under way at once."""

    def start(self, batch: Batch) -> Flight:
        """See Transfer. Nothing is waited for."""
        device, buffers = self._device, self._take()
        self._release_copied()
        with device.on(self._copies):
            device.copy(buffers.pixels_B3SS, batch.pixels)
            copied = device.record()
        self._copying.append((copied, batch))
        device.follow(copied)
        features_BD = self._encoder.encode(buffers.pixels_B3SS)
        # The encoder's own output may be written again by its next step before the locators have read it.
        device.copy(buffers.device_BD, features_BD)
        device.copy(buffers.host_BD, features_BD)
        return _DeviceFlight(self, batch, buffers, device.record())

    def _release_copied(self) -> None:
        """Give batches whose pixels are on the device back to the decoders. A flight does so too when it lands."""
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()[1].release()

    def _take(self) -> _Buffers:
        """Buffers that no batch on its way uses."""
        try:
            return self._free.popleft()
        except IndexError:
            pass
        self.num_buffers += 1
        device, encoder = self._device, self._encoder
        batch, side = encoder.batch_size, encoder.image_size
        # Where they are first written to: memory that torch hands out again may still be read on another stream.
        with device.on(self._copies):
            pixels_BSS3 = device.empty(batch, side, side, 3, dtype=torch.uint8)
        return _Buffers(
            pixels_BSS3.permute(0, 3, 1, 2),
            device.empty(batch, encoder.dim, dtype=torch.float32),
            device.pinned(batch, encoder.dim, dtype=torch.float32),
        )

    @contextmanager
    def _lent(self, buffers: _Buffers, num_photos: int) -> Iterator[Features]:
        try:
            # Beside the encoder's stream: there the locators would stand behind the batches that were started since.
            with self._device.on(self._locators):
                yield Features(buffers.host_BD[:num_photos].numpy(), buffers.device_BD[:num_photos])
        finally:
            self._free.append(buffers)


class _DeviceFlight:
    """A batch on a device."""

    def __init__(self, transfer: DeviceTransfer, batch: Batch, buffers: _Buffers, done: Any) -> None:
        self._transfer, self._batch, self._buffers, self._done = transfer, batch, buffers, done

    def wait(self) -> None:
        """The one place where a thread waits for the device."""
        self._done.synchronize()
        self._batch.release()

    def landed(self) -> AbstractContextManager[Features]:
        """See Flight."""
        return self._transfer._lent(self._buffers, len(self._batch.samples))
