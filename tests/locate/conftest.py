"""What the tests of heads' files share: a small head, and where it goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from locate_samples import C, D, make_state
from torch import Tensor


@pytest.fixture
def state() -> dict[str, Tensor]:
    return make_state(C, D)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.pt"
