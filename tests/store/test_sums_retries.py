"""Sums beside retries, which change what they are sums of."""

from __future__ import annotations

from pathlib import Path

import pytest
from end_samples import open_rank
from store_samples import is_retryable, retry_rank, staging_rows, take

from geoloc_batch.store.execution import Totals

pytestmark = pytest.mark.usefixtures("few_are_many")


def test_a_retry_is_counted_though_there_is_a_sum(retryable: Path) -> None:
    assert totals_of(retryable, 3).errors == 6
    assert len(retry_rank(retryable, staging_rows(6), choose=is_retryable)) == 3
    found = totals_of(retryable, 3)
    assert (found.rows, found.errors, found.units_failed) == (18, 0, 0)


@pytest.mark.parametrize("is_made_here", [False, True])
def test_what_a_retry_has_mended_beside_a_run_is_counted_at_its_end(retryable: Path, is_made_here: bool) -> None:
    if not is_made_here:
        totals_of(retryable, 3)
    run = open_rank(retryable, num_units=5)
    held = [take(run), take(run)]
    if is_made_here:
        assert run._adding is not None
        run._adding.go_on(may_begin=True)
    assert (retryable / "_sums").exists()
    assert len(retry_rank(retryable, staging_rows(6), choose=is_retryable)) == 3
    for execution in held:
        run.commit(execution, *staging_rows(6)(execution))
    assert run.acquire() is None
    found = run.totals()
    run.close()
    assert (found.done, found.rows, found.errors, found.units_failed) == (5, 30, 0, 0)


def totals_of(out: Path, num_units: int) -> Totals:
    ledger = open_rank(out, num_units=num_units)
    try:
        return ledger.totals()
    finally:
        ledger.close()
