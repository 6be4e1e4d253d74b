"""Scenarios for the model of the ledger: who works on what, and what happens to whom at which step."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from random import Random

from simulated_turns import Fault, Kind

ANY_KIND: tuple[Kind, ...] = ("kill", "stop", "fail", "fail late", "host", "power", "jump")
KINDS: tuple[tuple[Kind, ...], ...] = (
    ("kill",), ("stop",), ("fail", "fail late"), ("power",), ("power", "stop", "kill"),
    ("kill", "stop", "fail", "fail late", "host"), ANY_KIND,
)  # fmt: skip
AMOUNTS: dict[Kind, tuple[float, ...]] = {
    "stop": (0.5, 10.0, 70.0, 70.0, 200.0, 2000.0),
    "jump": (-100_000.0, -30.0, 30.0, 100.0, 100_000.0),
    "fail": (errno.EIO, errno.ENOSPC, errno.ESTALE),
    "fail late": (errno.EIO, errno.ESTALE),
}
# Where a fault happens, and within how many such steps: a unit takes about sixty, a start about forty.
PLACES = {
    "": 200, "_done": 20, "_leases": 50, "_staging": 60, "publish": 30, "img_emb": 8, "plan.parquet": 6, "run.json": 5,
    "create": 5, "put": 30, "sync": 12, "sync_folder": 15, "link": 4, "rename": 8, "read": 25, "stat": 60,
    "remove": 12, "remove_folder": 8, "make_folder": 15, "names": 15, "touch": 20,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One run. Equal scenarios run alike."""

    seed: int
    num_units: int = 3
    first_units: tuple[int, ...] = (3, 3)
    """How many of the units each rank knows of: later ones append to the plan."""
    num_hosts: int = 2
    has_links: bool = True
    switch_chance: float = 0.1
    abandon_chance: float = 0.0
    stop_chance: float = 0.0
    """How likely a rank is asked to end where it waits with nothing in hand."""
    in_hand: int = 1
    """Units that a rank holds at a time; with more than one, commits run beside acquire."""
    poison: int = -1
    """A unit that kills the process which works on it."""
    poisons_retries: int = 0
    """So many retries of it kill as well."""
    max_retries: int = 0
    """Rounds of retries that a rank may add to the first results, or do in their place."""
    num_retriers: int = 0
    """Ranks that do nothing but retries, of what they find done."""
    is_improving: bool = False
    """Each retry gives more rows, and only every other goal has a table of errors: else it is left to chance."""
    faults: tuple[Fault, ...] = ()
    num_late: int = 0
    """Ranks that are started while others still work or are stopped."""


def make_scenario(random: Random) -> Scenario:
    """Any scenario; `random` may be hypothesis's own, which then finds a smaller one that fails too."""
    kind = random.random()
    if kind < 0.3:
        return make_duel(random)
    if kind < 0.6:
        return make_retry_duel(random)
    num_units = random.choice([1, 1, 2, 3, 6])
    num_ranks = random.randint(1, 4)
    kinds = random.choice(KINDS)
    return Scenario(
        seed=random.randrange(1 << 32),
        num_units=num_units,
        first_units=tuple(random.choice([num_units, random.randint(1, num_units)]) for _ in range(num_ranks)),
        num_hosts=random.randint(1, 3),
        has_links=random.random() < 0.6,
        switch_chance=random.choice([0.01, 0.05, 0.2, 0.5]),
        abandon_chance=random.choice([0.0, 0.0, 0.3]),
        in_hand=random.choice([1, 1, 2]),
        poison=random.choice([-1, -1, -1, 0]),
        poisons_retries=random.choice([0, 1]),
        max_retries=random.choice([0, 0, 2]),
        num_late=random.choice([0, 1, 2]),
        faults=tuple(make_fault(random, random.choice(kinds), num_ranks) for _ in range(random.randint(1, 6))),
    )


def make_duel(random: Random) -> Scenario:
    """Ranks that are stopped for longer than a lease where a unit is decided, and wake up when another decides it."""
    num_ranks, num_units = random.randint(2, 3), random.randint(1, 2)
    marker = f"{random.randrange(num_units):06d}.json"

    def stop(process: int) -> Fault:
        # A rank looks for a unit's marker three or four times, writes it in four steps, and then publishes it.
        place, least, most = random.choice(
            [(marker, 8, 11), (marker, 8, 11), (marker, 1, 14), ("publish", 1, 20), ("_staging", 20, 60)]
        )
        until = random.choice([marker, marker, "img_emb", "_staging", "_leases", ""])
        return Fault("stop", process, place, random.randint(least, most), random.choice([100.0, 2000.0]), until)

    stops = [stop(process) for process in range(1, random.randint(1, num_ranks) + 1)]
    others = [make_fault(random, random.choice(ANY_KIND), num_ranks) for _ in range(random.choice([0, 0, 1]))]
    return Scenario(
        seed=random.randrange(1 << 32),
        num_units=num_units,
        first_units=(num_units,) * num_ranks,
        has_links=random.random() < 0.6,
        switch_chance=random.choice([0.01, 0.05, 0.2]),
        faults=(*stops, *others),
        num_late=random.choice([0, 1]),
    )


def make_retry_duel(random: Random) -> Scenario:
    """Ranks that retry the same units, and are hit where the result of a retry takes the place of what stood."""
    num_ranks, num_units = random.randint(1, 3), random.randint(1, 2)
    markers = [f"{random.randrange(num_units):06d}{retry}.json" for retry in ("", "r1", "r2")]

    def hit(process: int) -> Fault:
        kind = random.choice(random.choice([("stop",), ("kill", "power"), ANY_KIND]))
        place, most = random.choice(
            [(random.choice(markers), 16), ("img_emb", 24), ("errors", 8), ("rename", 24), ("remove_folder", 12),
             ("_done", 60), ("sync_folder", 60), ("", 600)]
        )  # fmt: skip
        until = random.choice([*markers, "img_emb", "errors", ""])
        amount = random.choice([100.0, 2000.0]) if kind == "stop" else random.choice(AMOUNTS.get(kind, (0.0,)))
        return Fault(kind, process, place, random.randint(1, most), amount, until if kind == "stop" else "")

    return Scenario(
        seed=random.randrange(1 << 32),
        num_units=num_units,
        first_units=(num_units,) * num_ranks,
        has_links=random.random() < 0.6,
        switch_chance=random.choice([0.01, 0.05, 0.2]),
        max_retries=random.choice([1, 3]),
        num_retriers=random.choice([0, 1, 2]),
        is_improving=random.random() < 0.5,
        faults=tuple(hit(random.randint(1, num_ranks + 2)) for _ in range(random.randint(1, 4))),
        num_late=random.choice([0, 1, 2]),
    )


def make_end_duel(random: Random) -> Scenario:
    """Ranks that are hit where one of them clears up for all; another has died between a marker and its moves."""
    num_ranks, num_units = random.randint(3, 4), random.randint(4, 6)
    faults = [Fault("kill", random.randint(1, num_ranks), random.choice(["img_emb", "rename"]), random.randint(1, 16))]
    for process in range(1, num_ranks + 1):
        kind = random.choice(["stop", "kill"])
        faults.append(Fault(kind, process, f"total.{num_units}.claim", random.randint(1, 3), 200.0))
    return Scenario(
        seed=random.randrange(1 << 32),
        num_units=num_units,
        first_units=(num_units,) * num_ranks,
        has_links=random.random() < 0.6,
        switch_chance=random.choice([0.05, 0.2]),
        stop_chance=random.choice([0.0, 0.3]),
        faults=tuple(faults),
    )


def make_fault(random: Random, kind: Kind, num_ranks: int) -> Fault:
    """A fault of a kind."""
    step = random.choice(list(PLACES))
    process = random.randint(1, random.choice([num_ranks, num_ranks, num_ranks + 2]))
    return Fault(kind, process, step, random.randint(1, PLACES[step]), random.choice(AMOUNTS.get(kind, (0.0,))))
