"""The verbs of the command line: the settings of each, the function of a room that it calls, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from geoloc_batch.errors import EXIT_FAILED, EXIT_WITH_ERRORS
from geoloc_batch.evaluate.config import EvaluateConfig
from geoloc_batch.geo.cells.config import BUILD_KINDS, BuildConfig, CeilingConfig, ConvertConfig, ShowConfig
from geoloc_batch.locate.config import ConvertHeadConfig, HeadsConfig
from geoloc_batch.model.config import WarmupConfig
from geoloc_batch.run.config import EmbedConfig, FidelityConfig, PredictConfig, RetryConfig, Summary
from geoloc_batch.store.config import MergeConfig, StatusConfig
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prove from the files that every photo gave one row or one error row."""

    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The output folder of the run."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Print versions, devices, decoding speed and write access, and what is wrong with any of it."""

    out: str = ""
    """Examine this folder too, as the place of a run's results."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Run the whole pipeline on a small synthetic Europe: pack, embed, train a head, predict. Downloads nothing."""

    out: str = "demo-out"
    """Folder of everything that the demo makes; what an earlier demo made there is replaced."""
    places: int = 3200
    """Places of the synthetic Europe; each is photographed in four directions."""
    seed: int = 0
    """Seed of places, photos and head."""


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _print_summary(summary: Summary) -> int:
    values = dataclasses.asdict(summary)
    code = int(values.pop("exit_code"))
    del values["places"]
    _print_json(values)
    return code


def _pack(config: PackConfig) -> int:
    from geoloc_batch.stream.pack import pack_with

    summary = pack_with(config)
    if summary.ignored:
        print(f"left out, no photos: {json.dumps(summary.ignored)}", file=sys.stderr)
    _print_json(dataclasses.asdict(summary))
    return EXIT_WITH_ERRORS if summary.skipped else 0


def _embed(config: EmbedConfig) -> int:
    if config.dry_run:
        return _measure_stream(config)
    from geoloc_batch.run.jobs import embed

    return _print_summary(embed(config))


def _measure_stream(config: EmbedConfig) -> int:
    from geoloc_batch.run.dry_run import as_json, format_report, measure_stream

    report = measure_stream(config)
    print(format_report(report))
    _print_json(as_json(report))
    return report.exit_code


def _predict(config: PredictConfig) -> int:
    from geoloc_batch.run.photos import format_table, predict

    summary = predict(config)
    if summary.places:
        print(format_table(summary))
    return _print_summary(summary)


def _retry(config: RetryConfig) -> int:
    from geoloc_batch.run.photos import retry

    return _print_summary(retry(config))


def _fidelity(config: FidelityConfig) -> int:
    from geoloc_batch.run.fidelity import as_json, format_fidelity, measure_fidelity

    report = measure_fidelity(config)
    print(format_fidelity(report))
    _print_json(as_json(report))
    return 0


def _warmup(config: WarmupConfig) -> int:
    from geoloc_batch.model.warmup import warm_up
    from geoloc_batch.run.workers import this_worker

    _print_json(dataclasses.asdict(warm_up(config, device=this_worker().device)))
    return 0


def _status(config: StatusConfig) -> int:
    from geoloc_batch.store.watch import show_status

    return show_status(config)


def _merge(config: MergeConfig) -> int:
    from geoloc_batch.store.merge import merge

    _print_json(dataclasses.asdict(merge(config)))
    return 0


def _verify(config: VerifyConfig) -> int:
    from geoloc_batch.store.verify import verify

    found = verify(config.out)
    for problem in found.problems:
        print(problem, file=sys.stderr)
    values = dataclasses.asdict(found)
    del values["problems"]
    _print_json(values)
    return 0 if found.ok else EXIT_FAILED


def _doctor(config: DoctorConfig) -> int:
    from pathlib import Path

    from geoloc_batch.run.doctor import examine

    findings = examine(out=Path(config.out) if config.out else None)
    for finding in findings:
        print(f"{finding.level:<8} {finding.topic:<15} {finding.text}")
        if finding.remedy:
            print(f"{'':<24} -> {finding.remedy}")
    problems = sum(finding.level == "problem" for finding in findings)
    _print_json({"findings": len(findings), "problems": problems})
    return EXIT_FAILED if problems else 0


def _demo(config: DemoConfig) -> int:
    from geoloc_batch.demo.pipeline import run_demo

    _print_json(run_demo(config.out, num_places=config.places, seed=config.seed))
    return 0


def _evaluate(config: EvaluateConfig) -> int:
    from geoloc_batch.evaluate.comparison import evaluate
    from geoloc_batch.evaluate.evaluation import format_table

    found = evaluate(config)
    print(format_table(found))
    _print_json(found.by_name())
    return 0


def _heads(_: HeadsConfig) -> int:
    from geoloc_batch.model.heads import format_heads, list_heads
    from geoloc_batch.model.hub import cached

    listing = list_heads(cached)
    print(format_heads(listing))
    _print_json(listing)
    return 0


def _heads_convert(config: ConvertHeadConfig) -> int:
    from geoloc_batch.locate.conversion import convert_head

    _print_json(dataclasses.asdict(convert_head(config)))
    return 0


def _train(config: TrainConfig) -> int:
    from geoloc_batch.train.commands import format_table, train

    trained = train(config)
    if trained.is_first:
        print(format_table(trained))
        _print_json(trained.by_name())
    return trained.exit_code


def _cells_build(config: BuildConfig) -> int:
    from geoloc_batch.geo.cells.commands import build
    from geoloc_batch.run.positions import read_positions

    _print_json(dataclasses.asdict(build(config, read_positions)))
    return 0


def _cells_show(config: ShowConfig) -> int:
    from geoloc_batch.geo.cells.commands import show
    from geoloc_batch.run.positions import read_positions

    _print_json(dataclasses.asdict(show(config, read_positions)))
    return 0


def _cells_convert(config: ConvertConfig) -> int:
    from geoloc_batch.geo.cells.commands import convert

    _print_json(dataclasses.asdict(convert(config)))
    return 0


def _cells_ceiling(config: CeilingConfig) -> int:
    from geoloc_batch.geo.cells.commands import measure_ceiling
    from geoloc_batch.run.positions import read_positions

    _print_json(dataclasses.asdict(measure_ceiling(config, read_positions)))
    return 0


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "pack": (PackConfig, _pack),
    "embed": (EmbedConfig, _embed),
    "predict": (PredictConfig, _predict),
    "retry": (RetryConfig, _retry),
    "status": (StatusConfig, _status),
    "merge": (MergeConfig, _merge),
    "verify": (VerifyConfig, _verify),
    "fidelity": (FidelityConfig, _fidelity),
    "warmup": (WarmupConfig, _warmup),
    "evaluate": (EvaluateConfig, _evaluate),
    "train": (TrainConfig, _train),
    "heads": (HeadsConfig, _heads),
    "heads convert": (ConvertHeadConfig, _heads_convert),
    **{f"cells build {kind}": (config, _cells_build) for kind, config in BUILD_KINDS.items()},
    "cells show": (ShowConfig, _cells_show),
    "cells convert": (ConvertConfig, _cells_convert),
    "cells ceiling": (CeilingConfig, _cells_ceiling),
    "doctor": (DoctorConfig, _doctor),
    "demo": (DemoConfig, _demo),
}
"""Of one, two or three words."""
