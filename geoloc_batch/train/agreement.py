"""Do all ranks of a training train the same? Each was given a command of its own, and reads files for itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from geoloc_batch.errors import InputError
from geoloc_batch.train.group import Group

Told = Mapping[str, Any]
"""What decides what a head is, by name; values are JSON's."""


def check_same(group: Group, heads: Sequence[Told], *, is_sweep: bool) -> None:
    """Refuse to train with ranks that were given, or see, something else than the first.

    Comes back when all ranks have compared, so that nothing is pinned to what one of them had by mistake.

    Args:
        group: the ranks.
        heads: what this rank has for each head of the command.
        is_sweep: whether they are a sweep's.

    Raises:
        InputError: this rank has something else; each thing that differs is named with both values.
        UserError: another one has.
    """
    firsts, is_first_sweep = group.from_first(lambda: (heads, is_sweep))
    if is_first_sweep != is_sweep or len(firsts) != len(heads):
        kinds = [
            f"{len(those)} head{'s' * (len(those) != 1)} {'with' if sweep else 'without'} --sweep"
            for those, sweep in ((firsts, is_first_sweep), (heads, is_sweep))
        ]
        differing = [f"the first rank trains {kinds[0]}, this one {kinds[1]}"]
    else:
        differing = list(dict.fromkeys(words for pair in zip(firsts, heads, strict=True) for words in _apart(*pair)))
    if differing:
        raise InputError(
            f"rank {group.rank} was given, or sees, something else than the first rank: {'; '.join(differing)}. Give "
            "all ranks the same command, and files that are the same on all nodes"
        )
    group.add(torch.zeros(1, device=group.device))


def _apart(first: Told, own: Told) -> Iterator[str]:
    """What differs, in words."""
    flat_first, flat_own = dict(_flat(first)), dict(_flat(own))
    names = [name for name in {**flat_first, **flat_own} if flat_first.get(name) != flat_own.get(name)]
    # A digest differs because something else does, which tells more where it is known.
    telling = [name for name in names if not (_is_digest(flat_first.get(name)) and _is_digest(flat_own.get(name)))]
    for name in telling or names:
        yield f"{name}: the first rank has {_shown(flat_first.get(name))}, this one {_shown(flat_own.get(name))}"


def _flat(told: Told, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in told.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value[:12]}..." if _is_digest(value) else json.dumps(value)
