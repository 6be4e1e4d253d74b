"""`geoloc embed --dry-run`: the stream alone, without an encoder, and what these shards could feed."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from geoloc_batch.cpus import usable_cpus
from geoloc_batch.errors import EXIT_COMPLETE, EXIT_INCOMPLETE, EXIT_WITH_ERRORS, CheckpointError
from geoloc_batch.model.batch_size import CPU_BATCH, CUDA_BATCHES
from geoloc_batch.model.checkpoint import read_config
from geoloc_batch.model.clip import FORMS
from geoloc_batch.model.hub import split_hub_id
from geoloc_batch.records import UnitEnd
from geoloc_batch.run.config import EmbedConfig
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.shards import expand_shards, plan_units
from geoloc_batch.stream.stats import StreamStats

log = logging.getLogger("geoloc_batch")

DEFAULT_IMAGE_SIZE = 336
"""Taken for an encoder that is not on this machine: StreetCLIP's, which most heads are made for."""

MAX_SHOWN_ERRORS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """What reading and decoding reached on this machine."""

    units: int
    samples: int
    """Photos packed or refused; `errors` of them were refused."""
    errors: int
    unit_errors: int
    """Shards that could not be read to their end."""
    seconds: float
    images_per_second: float
    """Photos packed into batches, over `seconds`."""
    limiting_stage: str
    """read or decode; none where there was no photo."""
    exit_code: int
    """As of a run: 0 all read; 3 with unit errors or too many refused photos; 75 stopped before the end."""
    image_size: int
    cores: int
    """CPUs that this process may use."""
    cpu_seconds: float
    """CPU time of this process: reading, decoding and packing. That of `pipe:` commands is not in it."""
    target_images_per_second: float
    stats: StreamStats
    """Busy times, waits and queues of the stream."""

    @property
    def images_per_second_per_core(self) -> float:
        """Photos packed per second of CPU time: what one core that does nothing else reaches."""
        return (self.samples - self.errors) / self.cpu_seconds if self.cpu_seconds else 0.0

    @property
    def target_cores(self) -> float:
        """Cores that would decode `target_images_per_second`."""
        rate = self.images_per_second_per_core
        return self.target_images_per_second / rate if rate else float("inf")

    @property
    def target_bytes_per_second(self) -> float:
        """Bytes of shards per second that hold `target_images_per_second`."""
        return self.target_images_per_second * self.stats.bytes_read / self.samples if self.samples else 0.0


def measure_stream(config: EmbedConfig) -> StreamReport:
    """Read, decode and pack as an embedding run would, and drop the batches.

    No encoder is loaded, nothing is downloaded, and `config.out` is neither needed nor touched. Ctrl-C ends the
    measurement early and tells what was seen so far.

    Raises:
        UserError: shards, a flag or the checkpoint cannot be used.
    """
    with StopSignal() as stop:
        units = plan_units(expand_shards(config.shards), limit=config.run.limit)
        image_size = image_size_of(config.encoder.encoder)
        batch_size = config.encoder.given_batch_size or (CUDA_BATCHES[0] if torch.cuda.is_available() else CPU_BATCH)
        stream = BatchStream(units, side=image_size, batch_size=batch_size, config=config.stream)
        telemetry = Telemetry(None, total_bytes=sum(unit.num_bytes for unit in units))
        stop.defer()
        cpu_started = time.process_time()
        with closing(stream), stop.calling(stream.close):
            unit_errors = _drain(stream, telemetry)
        cpu_seconds = time.process_time() - cpu_started
        telemetry.close()
    stats, samples = stream.stats(), telemetry.rows + telemetry.errors
    return StreamReport(
        units=len(units),
        samples=samples,
        errors=telemetry.errors,
        unit_errors=unit_errors,
        seconds=round(stats.seconds, 3),
        images_per_second=round(telemetry.rows / stats.seconds, 3) if stats.seconds else 0.0,
        limiting_stage=telemetry.limiting_stage() if samples else "none",
        exit_code=_exit_code(len(units), unit_errors, telemetry, config.run.max_error_rate),
        image_size=image_size,
        cores=usable_cpus(),
        cpu_seconds=round(cpu_seconds, 3),
        target_images_per_second=config.target_images_per_second,
        stats=stats,
    )


def image_size_of(encoder: str) -> int:
    """The side of the photos that `--encoder` takes, read without its weights.

    Returns:
        What the checkpoint's config says; DEFAULT_IMAGE_SIZE for a hub id whose config is not in the local cache.

    Raises:
        CheckpointError: it names nothing that is known, or its config cannot be read.
    """
    if encoder == "demo":
        from geoloc_batch.model.demo_weights import CONFIG

        return CONFIG.image_size
    if encoder.startswith("open_clip:"):
        return _open_clip_image_size(encoder)
    path = Path(encoder).expanduser()
    if path.is_dir():
        return read_config(path).image_size
    hub_id = split_hub_id(encoder)
    if hub_id is None:
        raise CheckpointError(f"--encoder {encoder}: no such folder; give {FORMS}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id[0], "config.json", revision=hub_id[1])
    return read_config(Path(cached).parent).image_size if isinstance(cached, str) else DEFAULT_IMAGE_SIZE


def format_report(report: StreamReport) -> str:
    """A report as lines for a terminal."""
    stats, target = report.stats, report.target_images_per_second
    threads = max(1, stats.decode_threads)
    seconds = max(stats.seconds, 1e-9)
    photos, memory, room = (
        wait_s / seconds for wait_s in (stats.photo_wait_s / threads, stats.memory_wait_s / threads, stats.room_wait_s)
    )
    # Where nothing was decoded, nobody knows what decoding takes.
    needs = (
        f"an encoder of {target:g} images/s needs {report.target_cores:.1f} cores that decode, "
        f"and shards that come at {report.target_bytes_per_second / 1e6:.1f} MB/s"
    )
    return "\n".join(
        [
            f"{report.samples} photos in {report.units} unit{'s' * (report.units != 1)}, {report.errors} errors, "
            f"{report.seconds:.1f} s",
            f"{report.images_per_second:.1f} images/s at {report.image_size} px, "
            f"{report.images_per_second_per_core:.1f} per core ({report.cpu_seconds / seconds:.1f} of {report.cores} "
            f"cores were at work), {stats.bytes_read / seconds / 1e6:.1f} MB/s read",
            f"limited by {report.limiting_stage}",
            "",
            f"{'stage':<10} {'threads':>7} {'busy':>7}  waited for",
            f"{'read':<10} {1:>7} {stats.read_busy:>7.1%}  room {room:.1%}",
            f"{'decode':<10} {threads:>7} {stats.decode_busy:>7.1%}  photos {photos:.1%}, memory {memory:.1%}",
            f"{'  packing':<10} {'':>7} {stats.pack_busy:>7.1%}",
            "",
            f"on average {stats.mean_samples_queued:.1f} photos waited to be decoded, "
            f"{stats.mean_batches_ready:.2f} batches to be taken",
            *([needs] if report.images_per_second_per_core else []),
        ]
    )


def as_json(report: StreamReport) -> dict[str, Any]:
    """What the command prints last: as a run, without rows and out."""
    names = ("units", "samples", "errors", "seconds", "images_per_second", "limiting_stage", "unit_errors")
    values = asdict(report)
    return {name: values[name] for name in names}


def _drain(stream: BatchStream, telemetry: Telemetry) -> int:
    """Take everything and give the buffers back at once; the number of shards that could not be read to their end."""
    unit_errors = 0
    for item in stream:
        telemetry.observe(stream.stats())
        if isinstance(item, Batch):
            item.release()
            telemetry.count(rows=len(item.samples))
        else:
            _tell_errors(item, MAX_SHOWN_ERRORS - telemetry.errors)
            unit_errors += item.unit_error is not None
            telemetry.count(errors=len(item.errors), units=1)
    telemetry.observe(stream.stats())
    return unit_errors


def _tell_errors(end: UnitEnd, max_photos: int) -> None:
    for error in end.errors[: max(0, max_photos)]:
        log.warning("%s: %s: %s: %s", error.shard, error.key, error.stage, error.message)
    for warning in end.warnings:
        log.warning("%s: %s", end.unit.source, warning)
    if end.unit_error is not None:
        log.warning("%s: %s", end.unit.source, end.unit_error.message)


def _exit_code(num_units: int, unit_errors: int, telemetry: Telemetry, max_error_rate: float) -> int:
    if telemetry.units < num_units:
        return EXIT_INCOMPLETE
    if unit_errors or telemetry.errors > max_error_rate * (telemetry.rows + telemetry.errors):
        return EXIT_WITH_ERRORS
    return EXIT_COMPLETE


def _open_clip_image_size(encoder: str) -> int:
    import open_clip

    arch = encoder.split(":")[1].replace("/", "-")
    config = open_clip.get_model_config(arch)
    if config is None:
        raise CheckpointError(f"--encoder {encoder}: open_clip has no architecture {arch!r}")
    size = config["vision_cfg"]["image_size"]
    return int(size if isinstance(size, int) else size[0])
