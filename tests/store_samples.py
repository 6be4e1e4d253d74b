"""What the tests of the store share: small units with known rows, a rank that works on them, a port that fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geoloc_batch.geo.located import Located
from geoloc_batch.records import RowError, Sample, Unit, UnitError
from geoloc_batch.store import adding, done, goal, ledger, schedule, search, sums, tables
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.marker import read_marker
from geoloc_batch.store.verify import verify

CONFIG: dict[str, Any] = {"encoder": "tiny", "precision": "fp32", "batch_size": 32, "top_k": 3}
NUM_FEATURES = 7
# Of the run that the fixtures `finished` and `out` hold.
NUM_FINISHED = 4
WORKER = "n1-7-r0"


def crowd(monkeypatch: pytest.MonkeyPatch, units_in_folder: int = 2) -> None:
    """Make so few units fill a folder of markers, and of what others have in work look at one at a time."""
    for room in (goal, done, schedule, sums, adding, ledger):
        monkeypatch.setattr(room, "THOUSAND", units_in_folder)
    for room, name in ((search, "SOME_JUDGED"), (search, "SOME_LOOKED_AT"), (ledger, "SOME_STAGED")):
        monkeypatch.setattr(room, name, 1)
    monkeypatch.setattr(adding, "STEP", 1)
    monkeypatch.setattr(adding, "MANY_FOLDERS", 2)


def make_units(count: int, *, first: int = 0) -> list[Unit]:
    """Units of different sizes, the third the largest."""
    return [
        Unit(index=number, kind="shard", source=f"shards/{number:05d}.tar", num_bytes=1000 + (number * 37) % 101)
        for number in range(first, first + count)
    ]


def make_samples(unit: Unit, count: int) -> list[Sample]:
    return [
        Sample(unit, unit.source, row, f"photo/{row:04d}", json.dumps({"number": row, "place": {"name": "é"}}).encode())
        for row in range(count)
    ]


def make_located(count: int, *, seed: int = 0, kept: int = 3) -> Located:
    random = np.random.default_rng(seed)
    return Located(
        position_deg=random.uniform(-90, 90, (count, 2)),
        topk_cell=random.integers(0, 500, (count, kept)).astype(np.int32),
        topk_prob=-np.sort(-random.random((count, kept)).astype(np.float32)),
        mean_deg=random.uniform(-90, 90, (count, 2)),
        spread_km=random.random(count).astype(np.float32),
        entropy=random.random(count).astype(np.float32),
    )


def write_pair(folder: Path, samples: list[Sample], features_ND: np.ndarray, index: int = 0) -> Path:
    """An embedding pair in `folder`; gives the .npy."""
    npy, parquet = (folder / path for path in tables.embedding_paths(index))
    npy.parent.mkdir(exist_ok=True)
    parquet.parent.mkdir(exist_ok=True)
    tables.write_embeddings(npy, parquet, samples, features_ND)
    return npy


def make_features(rows: int, width: int = 17, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, width)) * 13).astype(np.float32)


def rows_of(unit: Unit) -> int:
    """Good rows of a unit: 2 to 6."""
    return 2 + unit.index % 5


def write_unit(execution: Execution) -> tuple[list[str], UnitCounts]:
    """Stage what the unit always gives: embeddings, predictions and one error row."""
    unit = execution.unit
    count = rows_of(unit)
    samples = make_samples(unit, count)
    features_ND = np.random.default_rng(unit.index).normal(size=(count, NUM_FEATURES)).astype(np.float32)
    npy, parquet = tables.embedding_paths(unit.index)
    tables.write_embeddings(execution.stage(npy), execution.stage(parquet), samples, features_ND)
    places = tables.predictions_path(unit.index)
    tables.write_predictions(execution.stage(places), samples, make_located(count, seed=unit.index))
    errors = tables.errors_path(unit.index)
    tables.write_errors(execution.stage(errors), [RowError("bad", unit.source, count, "decode", "no photo", False)])
    counts = UnitCounts(samples=count + 1, rows=count, errors=1, unit_error=None, warnings=())
    return [npy, parquet, places, errors], counts


AtStep = Callable[[str, tuple[Any, ...]], None]
Write = Callable[[Execution], tuple[list[str], UnitCounts]]


def write_known(execution: Execution, files: dict[str, bytes]) -> tuple[list[str], UnitCounts]:
    """Like write_unit, from the bytes that it once wrote: quicker."""
    unit = execution.unit
    outputs = [path for path in files if f"_{unit.index:06d}." in path]
    for path in outputs:
        execution.stage(path).write_bytes(files[path])
    count = rows_of(unit)
    return outputs, UnitCounts(samples=count + 1, rows=count, errors=1, unit_error=None, warnings=())


def staging_rows(rows: int, errors: int = 0, *, is_cut: bool = False, seed: int = 0) -> Write:
    """What an execution stages: predictions and a table of errors, each only where there is one."""

    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        unit, outputs = execution.unit, []
        if rows:
            outputs.append(tables.predictions_path(unit.index))
            samples = make_samples(unit, rows)
            tables.write_predictions(execution.stage(outputs[-1]), samples, make_located(rows, seed=seed))
        if errors:
            outputs.append(tables.errors_path(unit.index))
            bad = [RowError(f"bad{n}", unit.source, rows + n, "read", "no answer", True) for n in range(errors)]
            tables.write_errors(execution.stage(outputs[-1]), bad)
        damage = UnitError(unit.source, "broke off", 512, None, retryable=True) if is_cut else None
        return outputs, UnitCounts(
            samples=rows + errors, rows=rows, errors=errors, unit_error=damage, warnings=(), retryable_errors=errors
        )

    return write


def is_retryable(counts: UnitCounts) -> bool:
    return counts.is_retryable


def take(ledger: Ledger) -> Execution:
    """The next unit, which there must be."""
    execution = ledger.acquire()
    assert isinstance(execution, Execution)
    return execution


def in_work(out: Path, num_units: int, num_done: int = 0, **options: Any) -> tuple[Ledger, Execution]:
    """A ledger that has done some units and holds one more."""
    ledger = Ledger(out, **options)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    for _ in range(num_done):
        execution = take(ledger)
        ledger.commit(execution, *write_unit(execution))
    return ledger, take(ledger)


def age(out: Path, name: str, seconds: float) -> None:
    """Make a lease look as if it had not been touched for so long."""
    path = out / "_leases" / name
    now_ns = os.stat(path).st_mtime_ns
    os.utime(path, ns=(now_ns, now_ns - int(seconds * 1e9)))


def work(ledger: Ledger, write: Write = write_unit) -> Iterator[Execution]:
    """Work until nothing is left, as a rank does; gives each execution after its commit."""
    waited = 0
    while (execution := ledger.acquire()) is not None:
        if execution == "wait":
            waited += 1
            assert waited < 3000, "waited for too long"
            ledger._files.sleep(0.01)
            continue
        outputs, counts = write(execution)
        ledger.commit(execution, outputs, counts)
        yield execution


def run_rank(out: Path, num_units: int, write: Write = write_unit, **options: Any) -> None:
    """A whole rank: open, adopt, work, close."""
    ledger = Ledger(out, **options)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    for _ in work(ledger, write):
        pass
    ledger.close()


def retry_rank(
    out: Path,
    write: Write = write_unit,
    *,
    choose: Callable[[UnitCounts], bool] = lambda counts: False,
    forced: Collection[int] = (),
    **options: Any,
) -> list[Goal]:
    """A whole rank of a retry; gives what it executed."""
    ledger = Ledger(out, **options)
    ledger.open(CONFIG)
    ledger.adopt_retries(choose, forced)
    goals = [execution.goal for execution in work(ledger, write)]
    ledger.close()
    return goals


def tree(out: Path) -> dict[str, bytes]:
    """Every result file and its bytes."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.relative_to(out).parts[0].startswith(("_", "plan", "run"))
    }


STEPS = (
    "create", "fill", "write", "sync", "sync_folder", "link", "rename",
    "remove", "remove_folder", "make_folder", "touch",
)  # fmt: skip


def with_steps(at_step: AtStep, files: OsFiles | None = None) -> OsFiles:
    """A port that calls `at_step` before each operation that changes something: a hook to die, stop or fail at it."""
    files = files or OsFiles()

    def wrap(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            at_step(name, arguments)
            return step(*arguments)

        return run

    for name in STEPS:
        setattr(files, name, wrap(name, getattr(files, name)))
    return files


def die_at(number: int, files: OsFiles | None = None) -> OsFiles:
    """A port that kills its process at the `number`-th step. A write that it dies in leaves half of the bytes."""
    left = number

    def at_step(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if name in ("write", "fill"):
                path, data = arguments
                Path(path).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    return with_steps(at_step, files)


def marker_of(out: Path, unit: int, retry: int = 0) -> Any:
    return read_marker(out, Goal(unit, retry))


def assert_clean(out: Path) -> None:
    assert verify(out).problems == []
    assert not [name for name in os.listdir(out / "_staging") if name[0].isdigit()]
    assert not [name for name in os.listdir(out / "_leases") if name[0].isdigit()]
