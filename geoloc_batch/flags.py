"""Flat flags and nested settings: one mapping serves the command line, TOML files and the Python functions."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from geoloc_batch.errors import ConfigError

Config = TypeVar("Config")


def flag_names(kind: type) -> dict[str, type]:
    """Every flat field of a settings dataclass, its nested dataclasses included, and its type."""
    hints = typing.get_type_hints(kind)
    names: dict[str, type] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        names.update(flag_names(typing.cast(type, hint)) if dataclasses.is_dataclass(hint) else {field.name: hint})
    return names


def from_flat(kind: type[Config], flags: Mapping[str, Any]) -> Config:
    """Build a settings dataclass from flat flags.

    Args:
        kind: the dataclass; its fields may be dataclasses whose fields stand flat among the flags.
        flags: values by field name; a dash stands for an underscore.

    Raises:
        ConfigError: a flag is unknown, has the wrong type or a value that cannot be, or a required one is absent.
    """
    values = _checked(kind, flags, "")
    absent = [name for name in _required(kind) if name not in values]
    if absent:
        raise ConfigError(f"{', '.join(absent)} must be given")
    return _build(kind, values)


def defaults_from_toml(kind: type[Config], path: str | Path, *, missing: Any, overridden: Collection[str]) -> Config:
    """Defaults for the command line from a TOML file: not validated as a whole, since flags are still to come.

    Args:
        kind: the dataclass.
        path: the TOML file; its keys are flat flags.
        missing: put in place of required fields that the file does not give.
        overridden: repeatable flags that the command line gives itself: the file's values are left out.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown key or a value of the wrong type.
    """
    values = _checked(kind, _read_toml(path), f" in {path}")
    return _build(kind, {name: value for name, value in values.items() if name not in overridden}, missing, raw=True)


def _checked(kind: type, flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = flag_names(kind)
    values: dict[str, Any] = {}
    for written, value in flags.items():
        name = written.replace("-", "_")
        if name in values:
            raise ConfigError(f"{name} stands twice{where}, as {name} and {written}; keep one")
        values[name] = value
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {name!r}{where}; {hint}")
    return {name: _coerce(name, value, known[name], where) for name, value in values.items()}


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from None


def _required(kind: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _build(kind: type[Config], values: Mapping[str, Any], missing: Any = None, *, raw: bool = False) -> Config:
    """Call the constructor, or, `raw`, set the fields behind its back: its checks come when the flags are known."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(typing.cast(type, hint), values, missing, raw=raw)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif raw and field.default is not dataclasses.MISSING:
            arguments[field.name] = field.default
        elif raw:
            arguments[field.name] = missing
    if not raw:
        return kind(**arguments)
    made = object.__new__(kind)
    for name, value in arguments.items():
        object.__setattr__(made, name, value)
    return made


def _coerce(name: str, value: Any, hint: Any, where: str) -> Any:
    """Accept what the flag's type takes, and a lone value for a tuple of one."""
    if get_origin(hint) is typing.Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{name}{where} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _coerce_to_one(name, value, [part for part in get_args(hint) if part is not type(None)], where)
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(name, item, get_args(hint)[0], where) for item in items)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name}{where} must be of type {hint.__name__}, got {value!r}")
    return value


def _coerce_to_one(name: str, value: Any, hints: list[Any], where: str) -> Any:
    """Accept what one of several types takes, such as a number or one word."""
    complaints = []
    for hint in hints:
        try:
            return _coerce(name, value, hint, where)
        except ConfigError as error:
            complaints.append(str(error))
    raise ConfigError("; or ".join(complaints))
