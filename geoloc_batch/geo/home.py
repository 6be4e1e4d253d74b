"""The user's home in settings: shells expand the ~ of `--out ~/cells.json`, and leave that of `--out=~/cells.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from os.path import expanduser
from typing import Any


def expand_home(config: Any, names: Collection[str]) -> None:
    """Expand a leading ~ in those fields of a settings dataclass, frozen or not, that are among `names`.

    A folder that is really called ~ is `./~`. The home of a user who is not there stays as it is written.
    """
    for field in dataclasses.fields(config):
        if field.name in names:
            object.__setattr__(config, field.name, expanduser(getattr(config, field.name)))
