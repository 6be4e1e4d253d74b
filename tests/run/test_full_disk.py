"""What is said where the disk of an output folder fills up while a run is at work."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from geoloc_batch.errors import GeolocError, UserError
from geoloc_batch.run.drive import explained_full_disk

OUT = Path("/data/out")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "Error writing bytes to file"),
    OSError(errno.ENOSPC, "No space left on device", str(OUT / "_staging" / "000001.ab" / "x.part")),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.ENOSPC, "No space left on device", str(OUT)),
])  # fmt: skip
def test_a_full_disk_is_told_with_the_folder_and_the_remedy(error: OSError) -> None:
    words = r"--out /data/out cannot be written on: .*; free some space there"
    with pytest.raises(GeolocError, match=words) as told, explained_full_disk(OUT):
        raise error
    # It has failed (exit code 1): the command was right.
    assert not isinstance(told.value, UserError)
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ENOSPC, "No space left on device", "/tmp/elsewhere"),
])  # fmt: skip
def test_other_errors_and_other_disks_are_left_as_they_are(error: OSError) -> None:
    with pytest.raises(OSError, match=r"error|device") as told, explained_full_disk(OUT):
        raise error
    assert told.value is error
