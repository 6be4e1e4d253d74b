"""How large a batch is where the user leaves it open: what the device's memory holds, found by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from geoloc_batch.model import encoder as encoder_module
from geoloc_batch.model import settling
from geoloc_batch.model.batch_size import is_shortage, largest_that_fits
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.encoder import load_encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fits", "tried"), [(256, [256]), (200, [256, 128]), (64, [256, 128, 64])])
def test_the_largest_batch_that_fits_is_taken(fits: int, tried: list[int]) -> None:
    seen: list[int] = []

    def try_out(size: int) -> None:
        seen.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert largest_that_fits(try_out, device=CPU) == tried[-1]
    assert seen == tried


def test_where_not_even_the_smallest_fits_the_devices_own_words_are_passed_on() -> None:
    def try_out(size: int) -> None:
        raise torch.OutOfMemoryError(f"no room for {size}")

    with pytest.raises(torch.OutOfMemoryError, match="no room for 64"):
        largest_that_fits(try_out, device=CPU)


def test_libraries_that_take_memory_of_their_own_have_their_own_words_for_its_end() -> None:
    words = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"

    def try_out(size: int) -> None:
        if size > 128:
            raise RuntimeError(words)

    assert largest_that_fits(try_out, device=CPU) == 128
    for said in (words, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory\nmore lines"):
        assert is_shortage(RuntimeError(said))
    assert not is_shortage(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_fault_of_another_kind_is_no_lack_of_memory() -> None:
    def try_out(_: int) -> None:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        largest_that_fits(try_out, device=CPU)


class Cuda:
    """Says that it is a CUDA device where the loader asks, and is the CPU for torch."""

    type = "cuda"


@pytest.mark.parametrize(("given", "size"), [("auto", 64), (0, 64), (100, 100)])
def test_on_cuda_auto_tries_sizes_out_and_a_given_one_is_taken_as_it_is(
    given: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    class Small:
        """An encoder of which 64 photos fit."""

        tower, device, sdpa = None, CPU, "default"

        def __init__(self, *_: Any, batch_size: int, **__: Any) -> None:
            self.batch_size = batch_size

        def settle(self, *, batch_size: int | None = None, sdpa: str = "") -> None:
            self.batch_size = batch_size or self.batch_size

        def cache_root(self) -> None:
            return None

        def graph_facts(self) -> dict[str, str]:
            return {}

        def try_out(self, batch_size: int) -> None:
            tried.append(batch_size)
            if batch_size > 64:
                raise torch.OutOfMemoryError

    monkeypatch.setattr(encoder_module, "device_of", lambda _: Cuda())
    monkeypatch.setattr(encoder_module, "Encoder", Small)
    loaded = load_encoder("demo", batch_size=given, precision="bf16")
    assert loaded.batch_size == size
    assert tried == ([] if given == 100 else [256, 128, 64])


def test_a_trial_computes_a_batch_of_its_size_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder("demo", batch_size=3, device="cpu", precision="fp32")
    seen: list[torch.Size] = []
    tower = encoder.tower
    monkeypatch.setattr(tower, "forward", lambda pixels: seen.append(pixels.shape))
    encoder.try_out(5)
    assert seen == [torch.Size([5, 56, 56, 3])]
    assert encoder.batch_size == 3


def test_on_a_cpu_auto_is_32_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "largest_that_fits", None)
    for given in ("auto", 0):
        assert load_encoder("demo", batch_size=given, device="cpu", precision="fp32").batch_size == 32  # type: ignore[arg-type]
    assert EncoderConfig().given_batch_size is None
