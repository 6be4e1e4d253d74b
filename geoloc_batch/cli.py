"""The command `geoloc`: parse, call a verb, exit code. No logic lives here."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from geoloc_batch.errors import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_MISUSE,
    ConfigError,
    GeolocError,
    StopRequested,
    UserError,
)
from geoloc_batch.flags import defaults_from_toml
from geoloc_batch.verbs import COMMANDS

_HELP = {"-h", "--help"}
_help_rules = ConstructorRegistry()
_PLAIN = "as tyro has it"
_POSITIONAL = get_args(Positional[str])[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 misuse; 3 and 75 as a run's Summary says."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("geoloc_batch").setLevel(logging.INFO)
    # It brings a handler of its own, beside which ours would print all of its warnings once more.
    logging.getLogger("huggingface_hub").propagate = False
    if arguments == ["--version"]:
        from geoloc_batch import __version__

        print(f"geoloc {__version__}")
        return 0
    if not arguments or arguments[0] in _HELP:
        print(_overview())
        return 0 if arguments else EXIT_MISUSE
    command = _command_of(arguments)
    if command is None or _is_of_group(command, arguments):
        return _no_command(arguments)
    try:
        return _run(command, arguments[len(command.split()) :])
    except GeolocError as error:
        _complain(str(error), *getattr(error, "__notes__", []))
        return EXIT_MISUSE if isinstance(error, UserError) else EXIT_FAILED
    except OSError as error:
        # Disks that fill up, folders that vanish: the operating system's words, the file's name, no traceback.
        _complain(str(error))
        return EXIT_FAILED
    except (StopRequested, KeyboardInterrupt):
        _complain("stopped before it was through; run the same command again")
        return EXIT_INCOMPLETE


def _run(command: str, arguments: list[str]) -> int:
    kind, function = COMMANDS[command]
    arguments, toml = _take_config(_filled_in(kind, arguments))
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
        registry=_help_rules,
        description=f"{kind.__doc__}\n\nFlags may also stand in a TOML file: --config FILE. Flags given here win.",
    )
    return function(config)


def _filled_in(kind: type[Any], arguments: list[str]) -> list[str]:
    """Give a flag its value where the settings say that it may stand without one, and no number follows it."""
    values: dict[str, str] = getattr(kind, "WITHOUT_VALUE", {})
    filled: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        filled.append(argument)
        value = values.get(argument.removeprefix("--")) if argument.startswith("--") else None
        if value is not None and not _is_number(following):
            filled.append(value)
    return filled


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@_help_rules.struct_rule
def _flowing(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Settings as tyro reads them, but their docstrings without its breaks where a source line ends."""
    if not dataclasses.is_dataclass(info.type) or _PLAIN in info.markers:
        return None
    plain = ConstructorRegistry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, _PLAIN)))
    assert isinstance(plain, StructConstructorSpec)
    return dataclasses.replace(plain, fields=tuple(map(_flowing_field, plain.fields)))


def _flowing_field(field: StructFieldSpec) -> StructFieldSpec:
    told = field.helptext

    def flowing() -> str | None:
        text = told() if callable(told) else told
        return text and " ".join(text.split())

    # "(default: )" says nothing: the docstring tells what happens without the flag.
    is_empty = field.default == "" or (field.default == () and _POSITIONAL in get_args(field.type))
    kind: Any = Annotated[field.type, arg(help_behavior_hint="")] if is_empty else field.type
    return dataclasses.replace(field, helptext=flowing, type=kind)


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


def _command_of(arguments: Sequence[str]) -> str | None:
    """The longest command that the first words name, None where they name none."""
    named = (name for name in COMMANDS if name.split() == list(arguments[: len(name.split())]))
    return max(named, key=len, default=None)


def _is_of_group(command: str, arguments: Sequence[str]) -> bool:
    """Whether a command that others begin with is followed by what only their group can answer: help, or a word."""
    rest = arguments[len(command.split()) :]
    return bool(rest and _beginning_with(command) and (rest[0] in _HELP or not rest[0].startswith("-")))


def _no_command(arguments: Sequence[str]) -> int:
    """Help for the words that several commands begin with; else an error."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    while words and not _beginning_with(" ".join(words)):
        words.pop()
    group = " ".join(words)
    rest = arguments[len(words) :]
    if words and rest and rest[0] in _HELP:
        print(_overview(group))
        return 0
    there = [name.removeprefix(f"{group} ") for name in _beginning_with(group)] if words else list(_heads())
    given = f"no command {rest[0]!r}" if rest else "a further word is missing"
    print(f"geoloc{f' {group}' if words else ''}: error: {given}; there are {', '.join(there)}", file=sys.stderr)
    return EXIT_MISUSE


def _beginning_with(group: str) -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{group} ")]


def _heads() -> dict[str, None]:
    """The first words of the commands, in their order."""
    return dict.fromkeys(name.split()[0] for name in COMMANDS)


def _overview(group: str = "") -> str:
    """Every command, or those that begin with the words of a group."""
    names = [*([group] if group in COMMANDS else []), *_beginning_with(group)] if group else list(COMMANDS)
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {str(COMMANDS[name][0].__doc__).splitlines()[0]}" for name in names]
    return "\n".join(
        [
            f"usage: geoloc {group or 'COMMAND'} [...]",
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
