"""The command `geoloc`: parse, call one function of a room, print, exit code. No logic lives here."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from geoloc_batch.errors import ConfigError, GeolocError, StopRequested, UserError
from geoloc_batch.flags import defaults_from_toml
from geoloc_batch.run.config import EmbedConfig, PredictConfig, Summary
from geoloc_batch.stream.packing.config import PackConfig

EXIT_FAILED, EXIT_MISUSE, EXIT_WITH_ERRORS, EXIT_INCOMPLETE = 1, 2, 3, 75
_HELP = {"-h", "--help"}


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say how far a run is."""

    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The output folder of the run."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 misuse; 3 and 75 as a run's Summary says."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("geoloc_batch").setLevel(logging.INFO)
    if arguments == ["--version"]:
        from geoloc_batch import __version__

        print(f"geoloc {__version__}")
        return 0
    if not arguments or arguments[0] in _HELP:
        print(_overview())
        return 0 if arguments else EXIT_MISUSE
    if arguments[0] not in COMMANDS:
        print(f"geoloc: error: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_MISUSE
    try:
        return _run(arguments[0], arguments[1:])
    except GeolocError as error:
        _complain(str(error), *getattr(error, "__notes__", []))
        return EXIT_MISUSE if isinstance(error, UserError) else EXIT_FAILED
    except OSError as error:
        # Disks that fill up, folders that vanish: the operating system's words, the file's name, no traceback.
        _complain(str(error))
        return EXIT_FAILED
    except (StopRequested, KeyboardInterrupt):
        _complain("stopped before the first photo; run the same command again")
        return EXIT_INCOMPLETE


def _run(command: str, arguments: list[str]) -> int:
    kind, function = COMMANDS[command]
    arguments, toml = _take_config(arguments)
    default = None
    if toml is not None:
        given = {argument.removeprefix("--").split("=")[0].replace("-", "_") for argument in arguments}
        default = defaults_from_toml(kind, toml, missing=tyro.MISSING, overridden=given)
    config = tyro.cli(
        kind,
        args=arguments,
        prog=f"geoloc {command}",
        default=default,
        config=(OmitArgPrefixes, UseAppendAction),
        description=f"{kind.__doc__}\n\nFlags may also stand in a TOML file: --config FILE. Flags given here win.",
    )
    return function(config)


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split off --config FILE, which every command understands."""
    rest: list[str] = []
    found: str | None = None
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config":
            found = next(pending, None)
            if found is None:
                raise ConfigError("--config is given without a file; give the path of a TOML file")
        elif argument.startswith("--config="):
            found = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return rest, found


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {str(kind.__doc__).splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: geoloc COMMAND [...]",
            "",
            "Geolocate millions of photos offline: tar shards in, one row per photo out.",
            "",
            *lines,
            "",
            "geoloc COMMAND --help explains every flag. The last line on stdout is one JSON object.",
            "Exit codes: 0 complete, 1 failed, 2 misuse, 3 complete with errors, 75 incomplete (run again).",
        ]
    )


def _complain(message: str, *notes: str) -> None:
    print(f"geoloc: error: {message}", *notes, sep="\n  ", file=sys.stderr)


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
    from geoloc_batch.run.jobs import embed

    return _print_summary(embed(config))


def _predict(config: PredictConfig) -> int:
    from geoloc_batch.run.photos import format_table, predict

    summary = predict(config)
    if summary.places:
        print(format_table(summary))
    return _print_summary(summary)


def _status(config: StatusConfig) -> int:
    from geoloc_batch.store.status import status

    _print_json(dataclasses.asdict(status(config.out)))
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


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "pack": (PackConfig, _pack),
    "embed": (EmbedConfig, _embed),
    "predict": (PredictConfig, _predict),
    "status": (StatusConfig, _status),
    "verify": (VerifyConfig, _verify),
    "doctor": (DoctorConfig, _doctor),
    "demo": (DemoConfig, _demo),
}
