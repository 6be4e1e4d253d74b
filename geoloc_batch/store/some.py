"""Some of many: what one of thousands of ranks looks at, where all of them looking at everything would be too much."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")

SOME_STAGED, SOME_LOOKED_AT, SOME_JUDGED, SOME_CLOCKS = 16, 32, 8, 16
"""Of what others have in work, at most so much is looked at at once."""
LOOK_S, PROMPT_S, REST_FACTOR = 1.0, 0.1, 4.0


def some(things: Sequence[Thing], count: int) -> Sequence[Thing]:
    """All in their order, or, where they are more than `count`, so many of them by chance."""
    return things if len(things) <= count else random.sample(things, count)


class Looks:
    """How long a rank looks for work, and how long it rests where that was in vain.

    Where looking takes long, too many look, and those who have work need the file server.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._began_s = self._rest_until_s = float("-inf")

    def begin(self) -> bool:
        """Whether it is time to look."""
        self._began_s = self._now_s()
        return self._began_s >= self._rest_until_s

    def is_long(self) -> bool:
        """Whether this look has lasted long enough."""
        return self._now_s() - self._began_s > LOOK_S

    def end(self, *, in_vain: bool) -> None:
        """Rest after what was in vain and not prompt, in proportion."""
        ended_s = self._now_s()
        if in_vain and ended_s - self._began_s > PROMPT_S:
            self._rest_until_s = ended_s + REST_FACTOR * (ended_s - self._began_s)
