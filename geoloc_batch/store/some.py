"""Some of many: what one of thousands of ranks looks at, where all of them looking at everything would be too much."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")

SOME_STAGED, SOME_GROUPS, SOME_TRIED, SOME_LOOKED_AT, SOME_JUDGED, SOME_CLOCKS = 16, 3, 8, 8, 4, 16
"""Of what others have in work, at most so much is looked at at once."""
LOOK_S, PROMPT_S, REST_FACTOR = 1.0, 0.1, 4.0
MANY_TRIED = 128
"""Units that a rank tries before it has looked in vain; SOME_TRIED after that."""
IDLE_SHARE, LONGEST_REST_S = 0.25, 15.0


def some(things: Sequence[Thing], count: int) -> Sequence[Thing]:
    """All in their order, or, where they are more than `count`, so many of them by chance."""
    return things if len(things) <= count else random.sample(things, count)


class Looks:
    """How long a rank looks for work, and how long it rests where that was in vain.

    Where looking takes long, too many look, and those who have work need the file server. Of a long plan there may be
    thousands who look: each does so the more seldom the longer it has found nothing.
    """

    def __init__(self, now_s: Callable[[], float], *, is_long: bool) -> None:
        self._now_s = now_s
        self._is_long = is_long
        self._began_s = self._rest_until_s = float("-inf")
        self._idle_since_s: float | None = None
        self._num_tries = 0
        self._has_news = False

    def wake(self) -> None:
        """Something has changed here: look at once. May be said by another thread, also in the midst of a look."""
        self._has_news = True

    def begin(self) -> bool:
        """Whether it is time to look."""
        if self._has_news:
            self._has_news, self._rest_until_s, self._idle_since_s = False, float("-inf"), None
        self._began_s, self._num_tries = self._now_s(), 0
        return self._began_s >= self._rest_until_s

    def goes_on(self) -> bool:
        """Whether one more unit is to be tried in this look: many, and fewer once a look has been in vain."""
        most = SOME_TRIED if self._idle_since_s is not None else MANY_TRIED
        return self.is_short() and (not self._is_long or self._num_tries < most)

    def tried(self) -> None:
        """A unit was tried."""
        self._num_tries += 1

    def is_short(self) -> bool:
        """Whether this look has not lasted long yet."""
        return self._now_s() - self._began_s <= LOOK_S

    def end(self, *, in_vain: bool, is_seldom: bool = False) -> None:
        """Rest after what was in vain, in proportion; `is_seldom` as in a long plan."""
        if not in_vain:
            self._idle_since_s = None
            return
        ended_s = self._now_s()
        if self._idle_since_s is None:
            self._idle_since_s = self._began_s
        took_s = ended_s - self._began_s
        rest_s = REST_FACTOR * took_s if took_s > PROMPT_S else 0.0
        if self._is_long or is_seldom:
            rest_s = min(max(rest_s, IDLE_SHARE * (ended_s - self._idle_since_s)), LONGEST_REST_S)
        self._rest_until_s = ended_s + rest_s
