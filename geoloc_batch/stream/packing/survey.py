"""The first walk over the photos: is each there, has each its own key? Eight bytes a photo are kept."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.stream.packing.sources import Photo

_NUM_SHOWN = 3


@dataclass(slots=True)
class Survey:
    """What the first walk found. Renames keys in the second."""

    num_photos: int
    """Photos named by the sources, those that cannot be read included."""
    fingerprint: int
    """Of all keys, in any order: tells whether the second walk met the same photos."""
    hashes: NDArray[np.uint64]
    """Of the keys of readable photos, ascending."""
    doubled: frozenset[int]
    """Hashes that stand there more than once."""
    _seen: dict[str, int] = field(default_factory=dict)
    _given: set[str] = field(default_factory=set)

    def final_key(self, key: str) -> str:
        """The key itself, for its first photo; key~2, key~3, ... for the later ones, past keys that are taken."""
        if key_hash(key) not in self.doubled:
            return key
        number = self._seen.get(key, 0) + 1
        name = key if number == 1 else f"{key}~{number}"
        while number > 1 and (name in self._given or self._is_taken(name)):
            number += 1
            name = f"{key}~{number}"
        self._seen[key] = number
        self._given.add(name)
        return name

    def _is_taken(self, key: str) -> bool:
        wanted = np.uint64(key_hash(key))
        position = int(np.searchsorted(self.hashes, wanted))
        return position < len(self.hashes) and self.hashes[position] == wanted


def key_hash(key: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def add_to_fingerprint(fingerprint: int, key: str) -> int:
    """The sum of the keys' hashes, modulo 2**64."""
    return (fingerprint + key_hash(key)) % (1 << 64)


def survey_photos(walk: Callable[[], Iterable[Photo]], config: PackConfig) -> Survey:
    """Walk the photos without reading them.

    Args:
        walk: starts a walk over all photos.
        config: says what to do about missing photos and doubled keys.
    Raises:
        InputError: photos are missing and are not to be skipped, or keys are doubled and are not to be renamed.
    """
    hashes, missing, num_photos, fingerprint = array("Q"), list[str](), 0, 0
    num_missing = 0
    for photo in walk():
        num_photos += 1
        fingerprint = add_to_fingerprint(fingerprint, photo.key)
        obstacle = photo.obstacle()
        if not obstacle:
            hashes.append(key_hash(photo.key))
            continue
        num_missing += 1
        if len(missing) < _NUM_SHOWN:
            missing.append(f"{photo.where}: {photo.path!r} ({obstacle})")
    if num_missing and not config.skip_missing:
        found = f"{num_missing} of {num_photos} photos cannot be read: {'; '.join(missing)}"
        more = " and others" if num_missing > len(missing) else ""
        raise InputError(f"{found}{more}. Mend the list, or pass --skip-missing to go on without them")
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, np.uint64)
    doubled = frozenset(int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]])
    if doubled and config.duplicates == "error":
        _refuse_doubled(walk(), doubled)
    return Survey(num_photos=num_photos, fingerprint=fingerprint, hashes=ordered, doubled=doubled)


def _refuse_doubled(photos: Iterable[Photo], doubled: frozenset[int]) -> None:
    """Name two photos with one key; nothing where only their hashes are equal."""
    first: dict[str, str] = {}
    for photo in photos:
        if key_hash(photo.key) in doubled and not photo.obstacle():
            if photo.key in first:
                raise InputError(
                    f"two photos have the key {photo.key!r}: {first[photo.key]} and {photo.where} ({len(doubled)} such "
                    "keys). Rename one, choose a --key-column, or pass --duplicates rename"
                )
            first[photo.key] = photo.where
