"""How many photos a second this machine decodes: what the stream could feed at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

from geoloc_batch.cpus import usable_cpus
from geoloc_batch.run.doctor import Finding

_SECONDS = 0.6
_PHOTO_SIDE, _ENCODER_SIDE = 640, 336


def check_decode() -> Iterator[Finding]:
    """Decode and resize a made-up street-sized JPEG, by one thread and by all."""
    import torch

    from geoloc_batch.stream.decode import decode_photo, fit

    data = _jpeg()

    def once() -> None:
        fit(decode_photo(data), _ENCODER_SIDE)

    cpus, before = usable_cpus(), torch.get_num_threads()
    # As in the stream, where each decode thread works alone.
    torch.set_num_threads(1)
    try:
        once()
        single, given = _rate(once, 1)
        every, given = _rate(once, cpus) if cpus > 1 else (single, given)
    finally:
        torch.set_num_threads(before)
    what = f"{_PHOTO_SIDE} x {_PHOTO_SIDE} JPEG of {len(data) / 1000:.0f} kB to {_ENCODER_SIDE} px"
    text = f"{single:.0f} photos/s by one thread, {every:.0f} by {cpus} ({what})"
    if cpus > 1 and every < 0.6 * cpus * single:
        remedy = "end other work here, or ask for CPUs of your own; where neither can be, lower --decode-threads"
        yield Finding("decode", "note", f"{text}: the threads were given {given:.1f} of {cpus} CPUs", remedy)
    else:
        yield Finding("decode", "ok", text)


def _rate(work: Callable[[], None], threads: int) -> tuple[float, float]:
    """Runs of ``work`` per second by ``threads`` threads, and the CPUs that the process was given for it."""

    def repeat(stop: float) -> int:
        count = 0
        while time.perf_counter() < stop:
            work()
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        start, cpu_start = time.perf_counter(), time.process_time()
        counts = list(pool.map(repeat, [start + _SECONDS] * threads))
        seconds = time.perf_counter() - start
        return sum(counts) / seconds, (time.process_time() - cpu_start) / seconds


def _jpeg() -> bytes:
    """A JPEG with the detail of a street photo, about 100 kB."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((_PHOTO_SIDE, _PHOTO_SIDE))
    noise = random.normal(0, 6, (_PHOTO_SIDE, _PHOTO_SIDE, 1))
    pixels = np.clip(np.asarray(coarse, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()
