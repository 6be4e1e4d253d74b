"""What a tar member's name says: whether it is a photo, its key, and whose json is whose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

from geoloc_batch.stream.packing.meta import IMAGE_EXTENSIONS, split_extension

META_EXTENSION = "json"


class MemberName(NamedTuple):
    """One member's name, taken apart."""

    stem: str
    """The path without its last extension: a photo's key."""
    extension: str
    """In lower case, without its dot; "" where there is none, and for what a file manager left behind."""
    group: str
    """The path up to the first dot of its last part. Members that stand together and share it may share a json."""

    @property
    def is_photo(self) -> bool:
        """Whether this is a photo."""
        return self.extension in IMAGE_EXTENSIONS

    @property
    def is_meta(self) -> bool:
        """Whether this is a photo's json."""
        return self.extension == META_EXTENSION

    @property
    def is_ignored(self) -> bool:
        """Whether the member counts for nothing, not even as the end of the group before it."""
        return not self.stem


_name: Callable[[tuple[str, str, str]], MemberName] = partial(tuple.__new__, MemberName)
"""MemberName(...) in half the time."""


def member_name(path: str) -> MemberName:
    """Take a member's path apart."""
    stem, _, extension = path.rpartition(".")
    if stem and "." not in stem and "/" not in stem and "/" not in extension:
        # Nearly every name, taken apart in half the time.
        return _name((stem, extension.lower(), stem))
    slash = path.rfind("/") + 1
    # A dot at the start hides a file, it ends no stem. macOS adds "._NAME" to each NAME that has attributes.
    first = slash
    while path.startswith(".", first):
        first += 1
    if slash != first and path.startswith("._", slash):
        return _IGNORED
    if slash and (path.startswith("__MACOSX/") or "PaxHeaders" in path[:slash]):
        return _IGNORED
    stem, extension = split_extension(path)
    dot = path.find(".", first)
    return MemberName(stem, extension, path if dot < 0 else path[:dot])


_IGNORED = MemberName("", "", "")


def key_digest(key: str) -> bytes:
    """16 bytes that stand for a key: small enough to remember for each photo of a shard, too many to collide."""
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
