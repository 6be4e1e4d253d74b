"""The checks of a CUDA machine: what they cost there, seen on a CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_graphs_are_counted_on_the_device_itself_with_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    check = importlib.import_module("check_gpu")
    made: list[Any] = []
    encoder_of = check.encoder_of

    def watched(clip: Any, case: Any, device: torch.device, *given: Any, **named: Any) -> Any:
        made.append((case, device))
        return encoder_of(clip, case, device, *given, **named)

    monkeypatch.setattr(check, "encoder_of", watched)
    device = torch.device("cpu", 0)
    assert check.graphs_beyond_one(device) == 0
    # A large one took minutes of a CPU, whatever the machine had beside it.
    assert [case.flop() < 1e9 for case, _ in made] == [True, True]
    assert all(where is device for _, where in made)
