"""What the file system and the hub's cache allow."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from geoloc_batch.run.doctor import Finding

_LITTLE_GB, _TOO_LITTLE_GB = 10.0, 1.0
_FEW_FILES = 1024


def check_output(out: Path | None) -> Iterator[Finding]:
    """Can results be written to ``out``: permission, hard links, space. A missing folder is not made."""
    wanted = Path.cwd() if out is None else out
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(wanted)):
        remedy = "write to a local or mounted folder, copy the results when the run is complete"
        yield Finding("output", "problem", f"{wanted} is an address; runs need a file system", remedy)
        return
    folder = next(parent for parent in (wanted.absolute(), *wanted.absolute().parents) if parent.exists())
    if not folder.is_dir():
        yield Finding("output", "problem", f"{folder} is a file", "choose another --out")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".geoloc-doctor-", dir=folder) as probe:
            links = _has_links(Path(probe))
    except OSError as error:
        yield Finding("output", "problem", f"{folder} cannot be written: {error.strerror}", "choose another --out")
        return
    free_gb = shutil.disk_usage(folder).free / 1e9
    text = f"{folder} can be written, {free_gb:.1f} GB free, {'with' if links else 'without'} hard links"
    if free_gb < _TOO_LITTLE_GB:
        yield Finding("output", "problem", text, "free space: a million photos take about 2 GB of embeddings")
    elif free_gb < _LITTLE_GB:
        yield Finding("output", "note", text, "a million photos take about 2 GB of embeddings")
    else:
        yield Finding("output", "ok", text)
    if not links:
        remedy = "runs publish by renaming folders instead; prefer a file system with hard links for several ranks"
        yield Finding("output", "note", f"{folder} has no hard links", remedy)


def _has_links(probe: Path) -> bool:
    (probe / "one").write_bytes(b"x")
    try:
        os.link(probe / "one", probe / "two")
    except OSError:
        return False
    return (probe / "two").stat().st_nlink == 2


def check_hub() -> Iterator[Finding]:
    """Where downloads are kept, whether they are allowed, and whether the default encoder is there already."""
    from huggingface_hub import constants, try_to_load_from_cache

    from geoloc_batch.model.config import STREETCLIP

    cache = Path(constants.HF_HUB_CACHE)
    is_offline = bool(constants.HF_HUB_OFFLINE)
    state = "offline (HF_HUB_OFFLINE is set)" if is_offline else f"downloads come from {constants.ENDPOINT}"
    repo = STREETCLIP.partition("@")[0]
    cached = any(cache.glob(f"models--{repo.replace('/', '--')}/snapshots/*/config.json")) or isinstance(
        try_to_load_from_cache(repo, "config.json"), str
    )
    text = f"cache {cache}, {state}; {repo} is {'in it' if cached else 'not in it'}"
    if cached or not is_offline:
        yield Finding("hub", "ok", text)
    else:
        remedy = "give --encoder a local folder, or fill the cache where there is a network and set HF_HOME to it"
        yield Finding("hub", "note", text, remedy)
    folder = next(parent for parent in (cache, *cache.parents) if parent.exists())
    if not os.access(folder, os.W_OK) and not is_offline:
        yield Finding("hub", "problem", f"{folder} cannot be written", "set HF_HOME to a folder that can")


def check_limits() -> Iterator[Finding]:
    """Open files, and room for temporary ones."""
    with contextlib.suppress(ImportError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = "no limit" if soft == resource.RLIM_INFINITY else str(soft)
        is_few = soft != resource.RLIM_INFINITY and soft < _FEW_FILES
        remedy = f"ulimit -n {hard if 0 < hard < 65536 else 65536}" if is_few else ""
        yield Finding("limits", "note" if is_few else "ok", f"{allowed} open files (ulimit -n)", remedy)
    temporary = Path(tempfile.gettempdir())
    free_gb = shutil.disk_usage(temporary).free / 1e9
    little = free_gb < _TOO_LITTLE_GB
    text = f"{temporary} has {free_gb:.1f} GB free for temporary files"
    yield Finding("limits", "note" if little else "ok", text, "set TMPDIR to a larger folder" if little else "")
