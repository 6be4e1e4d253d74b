"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from geoloc_batch.cli import main
from geoloc_batch.model.arithmetic import fix_summation_order

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Nothing in the tests may reach for a hub on the network; tests of hub code start their own local server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# As each command does, before any test's first product: later it is not heard, and on some processors a run in this
# process would differ in the last bit from one in another.
fix_summation_order()


@pytest.fixture(scope="session")
def real_photos() -> list[Path]:
    """The real photos beside the checkout; the test is skipped, saying so, where they are absent."""
    photos = sorted((SHARED_DATA / "photos").glob("*/*.jpg"))
    if not photos:
        pytest.skip(f"real photos are absent: {SHARED_DATA / 'photos'}")
    return photos


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """Runs a command that must end as misuse, exit code 2 and no traceback; gives what it said, frames taken away."""

    def run(arguments: Sequence[str]) -> str:
        try:
            code = main(list(arguments))
        except SystemExit as stop:  # tyro's own way out
            code = int(str(stop.code))
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert code == 2, said
        assert "Traceback" not in said
        return said

    return run
