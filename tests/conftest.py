"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Nothing in the tests may reach for a hub on the network; tests of hub code start their own local server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_photos() -> list[Path]:
    """The real photos beside the checkout; the test is skipped, saying so, where they are absent."""
    photos = sorted((SHARED_DATA / "photos").glob("*/*.jpg"))
    if not photos:
        pytest.skip(f"real photos are absent: {SHARED_DATA / 'photos'}")
    return photos
