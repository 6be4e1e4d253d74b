"""`geoloc heads convert`: a head from one form of file to the other, with everything that is known of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.errors import ConfigError, HeadError, OutputError
from geoloc_batch.locate.config import ConvertHeadConfig, LocateConfig
from geoloc_batch.locate.head_file import TENSORS, Head, read_head, read_remarks, save_head
from geoloc_batch.locate.requests import find_requests, is_on_hub, local_head
from geoloc_batch.model.hub import fetch

log = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedHead:
    """What `geoloc heads convert` ends with."""

    source: str
    out: str
    num_cells: int
    dim: int
    remarks: dict[str, str]
    """What was noted beside the tensors: tap, encoder_sha256, partition_fingerprint, position, fusion."""
    sha256: str
    """Of the file that was written."""


def convert_head(config: ConvertHeadConfig) -> ConvertedHead:
    """Write a head's four tensors and remarks anew, in one move; nothing else of the source is taken over.

    Raises:
        ConfigError, OutputError: OUT's name or folder cannot be.
        HeadError: the source is no head, or holds a pickle that is not trusted.
        HubError: it had to be downloaded and could not be.
    """
    out = Path(config.out)
    _check_out(out)
    # Cells are not converted; that they are named keeps the request from looking for them.
    (request,) = find_requests(LocateConfig(head=(config.source,), cells=("none",)))
    source = local_head(request, fetch)
    if out.exists() and out.samefile(source):
        raise OutputError(f"OUT {out} is the source itself; name another file")
    head = read_head(source, trust=config.trust)
    _refuse_contradiction(head, out)
    save_head(out, head.state, remarks=head.remarks)
    written = read_head(out)
    # In bits: what a reader of the one sees is what a reader of the other sees.
    assert all(written.state[name].equal(head.state[name]) for name in TENSORS)
    assert written.remarks == head.remarks
    cells = source.with_name("geocell_info.json")
    if not is_on_hub(request.file) and cells.exists() and cells.parent.resolve() != out.parent.resolve():
        log.info("its cells stay where they are: give --cells %s with %s, or copy them beside it", cells, out)
    return ConvertedHead(
        source=request.file,
        out=str(out),
        num_cells=head.num_cells,
        dim=head.dim,
        remarks=head.remarks,
        sha256=written.sha256,
    )


def _check_out(out: Path) -> None:
    """Before the work, not after it."""
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"OUT {out} must end in .safetensors, or in .pt as the published heads do")
    if out.is_dir():
        raise OutputError(f"OUT {out} is a folder; name a file")
    if not out.parent.is_dir():
        raise OutputError(f"the folder of OUT {out} does not exist; make {out.parent} first")


def _refuse_contradiction(head: Head, out: Path) -> None:
    """Where a head's file is silent, the head.json beside it speaks: that of another head must not."""
    beside = read_remarks(out.with_name("head.json"))
    added = sorted(beside.keys() - head.remarks.keys())
    if added:
        raise HeadError(
            f"{out.with_name('head.json')} says of its head {', '.join(f'{name} {beside[name]}' for name in added)}, "
            f"which {head.path} does not: it is of another head; give OUT a folder of its own"
        )
