"""The one config loader: YAML files and key=value overrides, later ones winning, as a frozen dataclass."""

import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from configs.errors import UserError
from configs.overrides import NULLS, merge_args, merged, parse_container, read_settings
from configs.storage import write_text

T = TypeVar("T")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as YAML has it


def load_config(cls: type[T], args: Sequence[str]) -> T:
    """The dataclass `cls` from `args`: paths of YAML files and `key.sub=value` overrides, later ones winning."""
    return build(cls, merge_args(args))


def load_file(cls: type[T], path: str | Path, args: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a YAML file that a program wrote, resolving nothing in it, and the user's `args`."""
    return build_from(cls, merged(read_settings(path), merge_args(args)), path)


def build_from(cls: type[T], values: Mapping[str, Any], file: str | Path) -> T:
    """As `build` from what `file` holds, which errors name."""
    try:
        return build(cls, values)
    except UserError as error:
        raise UserError(f"{file}: {error}; correct it there, or delete what an earlier version wrote") from error


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The dataclass `cls` (nested ones too) from plain `values`; `prefix` is put before the keys in errors.

    A value may be the text that stands for it in an argument or in YAML. A setting of type str takes it as it is.
    """
    hints = typing.get_type_hints(cls)
    settings = {setting.name: setting for setting in fields(typing.cast(Any, cls)) if setting.init}
    for key in values:
        if key not in settings:
            nearest = "".join(difflib.get_close_matches(str(key), settings, n=1, cutoff=0))
            raise UserError(f"unknown setting {prefix + str(key)!r}; did you mean {prefix + nearest!r}?")
    for name, setting in settings.items():
        if name not in values and setting.default is MISSING and setting.default_factory is MISSING:
            raise UserError(f"{prefix + name!r} is required")
    converted = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    for key, value in converted.items():
        if limits := settings[key].metadata.get("range"):
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(number is None or limits[0] <= number <= limits[1] for number in numbers):
                raise UserError(f"{prefix}{key}={value} must lie between {limits[0]} and {limits[1]}")
    return cls(**converted)


def within(low: float, high: float, default: Any = MISSING) -> Any:
    """A setting that `build` refuses outside of [low, high]; of a tuple every value."""
    return field(default=default, metadata=limits(low, high))


def limits(low: float, high: float) -> dict[str, tuple[float, float]]:
    """The field metadata of such a setting."""
    return {"range": (low, high)}


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (option,) = (arg for arg in args if arg is not type(None))  # settings are `X | None`, and no other unions
        return None if value is None or value in NULLS else _convert(option, value, key)
    if origin is Literal:
        choices = {str(choice): choice for choice in args}
        if str(value) not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}")
        return choices[str(value)]
    if origin is tuple:
        items = parse_container(value)
        if not isinstance(items, list | tuple) or (args[-1] is not Ellipsis and len(items) != len(args)):
            count = "" if args[-1] is Ellipsis else f" of {len(args)}"
            raise UserError(f"{key} must be a list{count}, not {value!r}")
        hints = args[:1] * len(items) if args[-1] is Ellipsis else args
        return tuple(_convert(*of_item, f"{key}[{i}]") for i, of_item in enumerate(zip(hints, items, strict=True)))
    if origin is dict or is_dataclass(hint):
        settings = parse_container(value)
        if not isinstance(settings, Mapping):
            raise UserError(f"{key} holds settings of its own; {value!r} is none")
        if origin is dict:
            return {_convert(args[0], str(k), key): _convert(args[1], v, f"{key}.{k}") for k, v in settings.items()}
        return build(typing.cast(type, hint), settings, f"{key}.")
    return value if hint is Any else _convert_scalar(hint, value, key)


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    text = str(value).strip()
    if hint is not str and (isinstance(value, str) or (hint is float and type(value) is int)):
        with suppress(ValueError, KeyError):  # then it stays what it is
            value = SWITCH[text.lower()] if hint is bool else hint(text)
    if type(value) is not hint:
        raise UserError(f"{key} must be of type {hint.__name__}, not {value!r}")
    if isinstance(value, int | float) and not abs(value) < (2**63 if hint is int else math.inf):
        raise UserError(f"{key} must be a finite number of at most 64 bits, not {value}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dict that `build` turns back into `config`; tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict of dotted names."""
    settings = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        settings |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return settings


def save_config(config: Any, path: str | Path) -> None:
    """Writes the dataclass as YAML that `load_config` reads back to an equal one."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
