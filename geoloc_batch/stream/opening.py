"""Opening a unit's shard: what has become of it since it was planned, and which failures no other run will mend."""

from __future__ import annotations

import errno

from geoloc_batch.records import Unit
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.source import FileSource, Source, SourceError, open_source
from geoloc_batch.stream.tar_header import BLOCK, HeaderError, parse_header

# The name itself is at fault. What is absent or forbidden may come back: a mount, a permission.
_LASTING = frozenset(
    {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.E2BIG, errno.EINVAL},
)


def is_lasting(error: OSError) -> bool:
    """Whether opening will fail in the same way at any other time."""
    return error.errno in _LASTING


def open_unit(unit: Unit, interrupt: Interrupt) -> tuple[Source, tuple[str, ...]]:
    """Open what a unit reads.

    Args:
        unit: a shard, or a range of one.
        interrupt: see open_source.

    Returns:
        The source, and warnings: a whole shard of another size than it was planned with is read as it is.

    Raises:
        OSError: it cannot be opened, or a range of it no longer stands where it was planned; see is_lasting.
    """
    source = open_source(unit.source, start=unit.start, interrupt=interrupt)
    if unit.start > 0 or unit.stop is not None:
        try:
            _check_range(unit, source)
        except BaseException:
            source.close()
            raise
    elif source.num_bytes is not None and unit.num_bytes not in (0, source.num_bytes):
        planned, now = unit.num_bytes, source.num_bytes
        return source, (f"it had {planned} bytes when it was planned and has {now} now; it is read as it is",)
    return source, ()


def _check_range(unit: Unit, source: Source) -> None:
    """Raise OSError where the file is not the one that was cut into ranges, as far as one range can tell."""
    now = source.num_bytes
    if not isinstance(source, FileSource) or now is None:
        raise _changed("it is no plain tar file any more")
    if unit.stop is None and unit.start + unit.num_bytes != now:
        raise _changed(f"it had {unit.start + unit.num_bytes} bytes when it was planned and has {now} now")
    if unit.stop is not None and unit.stop >= now:
        raise _changed(f"it had more than {unit.stop} bytes when it was planned and has {now} now")
    # A range knows the size of the whole file only where it is the last; its borders it knows always.
    for border in (unit.start, unit.stop):
        if border is not None and not _is_border(source, border):
            raise _changed(f"no member begins at byte {border} any more, as one did when it was planned")


def _is_border(source: FileSource, position: int) -> bool:
    try:
        parse_header(source.peek(BLOCK, position))
    except HeaderError:
        return False
    except SourceError as failure:
        raise OSError(str(failure)) from failure
    return True


def _changed(words: str) -> OSError:
    return OSError(errno.ESTALE, f"{words}; this part of it was left unread: put the file back as it was")
