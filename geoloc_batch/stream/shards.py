"""Names, globs, brace ranges, folders, `pipe:` commands and http(s) addresses -> the units of a run."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

from geoloc_batch.errors import ConfigError, DamageError, InputError
from geoloc_batch.records import Unit
from geoloc_batch.stream.names import key_digest, member_name
from geoloc_batch.stream.source import FileSource, open_source
from geoloc_batch.stream.tar import TarReader
from geoloc_batch.stream.web import address_fault, head_num_bytes, is_http

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
"""What a folder is searched for."""

_GLOB_CHARACTERS = frozenset("*?[")


def expand_shards(shards: Sequence[str]) -> list[str]:
    """Name every shard that the user means.

    Args:
        shards: paths, globs, brace ranges as in webdataset, folders, `pipe:COMMAND` (taken as it is), http(s)
            addresses (with braces). An existing path is meant as it stands, whatever characters are in it.

    Returns:
        The shards in the order given; those of one glob or folder sorted.

    Raises:
        InputError: something gives no shard, a file is absent, an address is malformed, or a shard is meant twice.
    """
    if not shards:
        raise InputError("no shards were given; name tar files, a folder or a glob")
    names: list[str] = []
    missing: list[str] = []
    for pattern in shards:
        names += _expanded(pattern, missing)
    if missing:
        more = f" ({len(missing)} shards are missing in all)" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]} does not exist{more}; check the path, or quote the pattern")
    _refuse_doubles(names)
    return names


def _expanded(pattern: str, missing: list[str]) -> Iterator[str]:
    if not pattern.strip():
        raise InputError(
            "a shard's name is empty; give a tar file, a folder, a glob, pipe:COMMAND or an http(s) address"
        )
    if pattern.startswith("pipe:"):
        if not pattern.removeprefix("pipe:").strip():
            raise InputError("pipe: names no command; write for example 'pipe:cat 000000.tar'")
        yield pattern
    elif is_http(pattern):
        for address in _braces(pattern):
            if fault := address_fault(address):
                raise InputError(f"{address} is no address to ask for: {fault}; write http://HOST[:PORT]/PATH")
            yield address
    elif "://" in pattern:
        scheme = pattern.split("://", 1)[0]
        raise InputError(
            f"{pattern}: {scheme}:// is not read directly; use a command that writes the shard to its output, "
            f"for example 'pipe:aws s3 cp {pattern} -'"
        )
    elif os.path.exists(pattern):
        yield from _local(pattern)
    else:
        for path in _braces(pattern):
            if os.path.exists(path):
                yield from _local(path)
            elif _GLOB_CHARACTERS.intersection(path):
                yield from _globbed(path)
            else:
                missing.append(path)


def _braces(pattern: str) -> list[str]:
    # webdataset's own dependency for the same syntax; importing webdataset itself would load torch.
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: its braces do not match; write {{000000..000003}} or {{a,b}}") from error


def _local(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    found = _shards_in(path)
    if not found:
        raise InputError(
            f"the folder {path} holds no {', '.join(SHARD_ENDINGS)}; pack photos into shards with `geoloc pack` first"
        )
    return found


def _shards_in(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(SHARD_ENDINGS) and not name.startswith("."))
    return [path for name in names if os.path.isfile(path := os.path.join(folder, name))]


def _globbed(pattern: str) -> list[str]:
    found: list[str] = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        found += _shards_in(path) if os.path.isdir(path) else [path]
    if not found:
        raise InputError(f"{pattern} matches no shard; check the pattern and the folder")
    return found


def _refuse_doubles(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        place = name if name.startswith("pipe:") or is_http(name) else os.path.abspath(name)
        if place in seen:
            also = "" if seen[place] == name else f" (also as {seen[place]})"
            raise InputError(f"the shard {name} is given twice{also}; each shard may stand once in a run")
        seen[place] = name


def plan_units(shards: Sequence[str], *, limit: int | None = None, split_bytes: int = 4 << 30) -> list[Unit]:
    """Cut shards into the units of a run.

    Args:
        shards: as expand_shards returns them.
        limit: read at most the first so many photos, in the order of the shards; None for all. The headers of local
            shards are walked to find where that is; a stream may give fewer.
        split_bytes: an uncompressed local tar above this is cut at the borders of samples into ranges of about this
            size. One with damage, with a key that stands twice, or with a PAX header for all members stays whole.

    Returns:
        Units with indices from 0. num_bytes is 0 where the size is not known.

    Raises:
        ConfigError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    sizes = _sizes(shards)
    units: list[Unit] = []
    left = limit
    for shard in shards:
        max_rows = left
        if left is not None and os.path.isfile(shard):
            num_photos = _count_photos(shard, left)
            max_rows = left if num_photos >= left else None
            left -= num_photos
        elif left is not None:
            left = 0
        index = len(units)
        if max_rows is None:
            units += _whole_or_ranges(shard, index, sizes[shard], split_bytes)
        else:
            units.append(Unit(index=index, kind="shard", source=shard, num_bytes=sizes[shard], max_rows=max_rows))
        if left is not None and left <= 0:
            break
    return units


def _is_local(shard: str) -> bool:
    return not shard.startswith("pipe:") and not is_http(shard)


def _sizes(shards: Sequence[str]) -> dict[str, int]:
    """Bytes of each shard, 0 where that cannot be known."""
    sizes = dict.fromkeys(shards, 0)
    for shard in shards:
        if _is_local(shard) and os.path.isfile(shard):
            sizes[shard] = os.path.getsize(shard)
    addresses = [shard for shard in shards if is_http(shard)]
    silent: set[str] = set()

    def ask(url: str) -> int:
        host = urlsplit(url).netloc
        # One server that cannot be reached must not cost a time-out for each of its shards.
        if host in silent:
            return 0
        try:
            return head_num_bytes(url)
        except OSError:
            silent.add(host)
            return 0

    if addresses:
        with ThreadPoolExecutor(max_workers=8) as pool:
            sizes.update(zip(addresses, pool.map(ask, addresses), strict=True))
    return sizes


def _count_photos(shard: str, enough: int) -> int:
    """Photos of a local shard, counted up to `enough` and up to the first damage."""
    count = 0
    try:
        with closing(open_source(shard)) as source:
            tar = TarReader(source)
            for member in tar:
                tar.skip()
                count += member_name(member.name).is_photo
                if count >= enough:
                    break
    except (OSError, DamageError):
        # Reading the unit will meet the same and say it.
        return count
    return count


def _whole_or_ranges(shard: str, index: int, num_bytes: int, split_bytes: int) -> list[Unit]:
    whole = Unit(index=index, kind="shard", source=shard, num_bytes=num_bytes)
    if num_bytes <= split_bytes or not _is_local(shard):
        return [whole]
    cuts = _range_starts(shard, split_bytes)
    if len(cuts) < 2:
        return [whole]
    ends = [start for start, _ in cuts[1:]]
    return [
        Unit(
            index=index + place,
            kind="shard",
            source=shard,
            num_bytes=(stop or num_bytes) - start,
            start=start,
            stop=stop,
            first_row=first_row,
        )
        for place, ((start, first_row), stop) in enumerate(zip(cuts, [*ends, None], strict=True))
    ]


def _range_starts(shard: str, split_bytes: int) -> list[tuple[int, int]]:
    """(first byte, first row) of each range; nothing where the shard must stay whole."""
    cuts = [(0, 0)]
    keys: set[bytes] = set()
    group, num_photos = "", 0
    try:
        with closing(open_source(shard)) as source:
            if not isinstance(source, FileSource):
                return []
            tar = TarReader(source)
            for member in tar:
                name = member_name(member.name)
                if name.is_ignored:
                    continue
                if name.group != group and member.offset - cuts[-1][0] >= split_bytes:
                    cuts.append((member.offset, num_photos))
                group = name.group
                if name.is_photo:
                    num_photos += 1
                    keys.add(key_digest(name.stem))
    except (OSError, DamageError):
        return []
    return [] if tar.has_global_header or len(keys) < num_photos else cuts
