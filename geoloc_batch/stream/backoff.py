"""When a sender that failed is asked again: waits that grow, partly at random, bounded in number and in time."""

from __future__ import annotations

import random
import time

from geoloc_batch.stream.interrupt import Interrupt

MAX_TRIES = 5
"""Tries in a row that bring nothing; then the sender is given up."""
MAX_FAILING_S = 300.0
"""No further try begins so long after the first failure of a row."""
FIRST_WAIT_S = 0.5
"""Wait before the second try, at most; it doubles with each further one."""
MAX_WAIT_S = 30.0
"""Where the doubling ends."""
MAX_RETRY_AFTER_S = 60.0
"""What a server may ask for by Retry-After; of a longer span only this is waited."""


class Backoff:
    """Waits between the tries for one shard.

    Args:
        interrupt: ends a wait in an OSError.
        max_tries: tries in a row that bring nothing, None for MAX_TRIES.
    """

    def __init__(self, interrupt: Interrupt, *, max_tries: int | None = None) -> None:
        self.num_retries = 0
        """Waits that have led to another try, in all."""
        self.num_vain = 0
        """Failures since there was progress last."""
        self._interrupt = interrupt
        self._max_tries = MAX_TRIES if max_tries is None else max_tries
        self._failing_since = 0.0

    def note_progress(self) -> None:
        """Say that something came: what failed before no longer counts."""
        self.num_vain = 0

    def wait(self, retry_after_s: float = 0.0) -> bool:
        """Note a failure and wait until the next try.

        Args:
            retry_after_s: what the server asked for.

        Returns:
            False, at once, where there is to be no further try.

        Raises:
            OSError: the wait was interrupted.
        """
        now = time.monotonic()
        if not self.num_vain:
            self._failing_since = now
        self.num_vain += 1
        # At random, so that many processes that were refused together do not come back together.
        wait_s = min(FIRST_WAIT_S * 2 ** (self.num_vain - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0)
        wait_s += min(retry_after_s, MAX_RETRY_AFTER_S)
        if self.num_vain >= self._max_tries or now + wait_s - self._failing_since > MAX_FAILING_S:
            return False
        self._interrupt.sleep(wait_s)
        self.num_retries += 1
        return True
