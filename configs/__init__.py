"""The one config loader: YAML files and key=value overrides, later ones winning, as a frozen dataclass."""

import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from configs.errors import UserError
from configs.files import write_text
from configs.overrides import NULLS, merge_args, merged, parse_container, read_settings

T = TypeVar("T")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as YAML has it


class UnknownSettingError(UserError):
    """A key that is no setting."""


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
    except UnknownSettingError as error:
        raise UserError(f"{file}: {error}; an earlier version may have written it: delete that line") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The dataclass `cls` (nested ones too) from plain `values`; `prefix` is put before the keys in errors.

    A value may be the text that stands for it in an argument or in YAML. A setting of type str takes it as it is.
    """
    hints = typing.get_type_hints(cls)
    settings = {setting.name: setting for setting in fields(typing.cast(Any, cls)) if setting.init}
    for key in values:
        if key not in settings:
            near = difflib.get_close_matches(str(key), settings, n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known here: {', '.join(settings)}"
            raise UnknownSettingError(f"unknown setting {prefix + str(key)!r}; {hint}")
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
    return field(default=default, metadata={"range": (low, high)})


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        (option,) = (arg for arg in args if arg is not type(None))  # settings are `X | None`, and no other unions
        return None if value is None or value in NULLS else _convert(option, value, key)
    if origin is Literal:
        if str(value) not in map(str, args):
            raise UserError(f"{key} must be one of {', '.join(map(str, args))}, not {value!r}")
        return next(choice for choice in args if str(choice) == str(value))
    if origin in (tuple, list):
        return _convert_list(origin, args, parse_container(value), key)
    if not is_dataclass(hint) and origin is not dict:
        return _convert_scalar(hint, value, key)
    settings = parse_container(value)
    if not isinstance(settings, Mapping):
        raise UserError(f"{key} holds settings of its own; {value!r} is none")
    if origin is dict:
        return {_convert(args[0], str(k), key): _convert(args[1], v, f"{key}.{k}") for k, v in settings.items()}
    return build(typing.cast(type, hint), settings, f"{key}.")


def _convert_list(cls: type, args: tuple[Any, ...], values: Any, key: str) -> Any:
    if not isinstance(values, list | tuple):
        raise UserError(f"{key} must be a list, not {values!r}")
    hints = args if cls is tuple and args[-1] is not Ellipsis else args[:1] * len(values)
    if len(hints) != len(values):
        raise UserError(f"{key} needs {len(hints)} values, not {len(values)}")
    return cls(_convert(hint, value, f"{key}[{i}]") for i, (hint, value) in enumerate(zip(hints, values, strict=True)))


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    if hint is str and type(value) in (int, float):
        return str(value)
    if (isinstance(value, str) and hint is not str) or (hint is float and type(value) is int):
        value = _parse_scalar(hint, str(value).strip())
    if type(value) is not hint:
        raise UserError(f"{key} must be of type {hint.__name__}, not {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key} must be a number of at most 64 bits, not {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be a finite number, not {value}")
    return value


def _parse_scalar(hint: type, text: str) -> Any:
    """The value of type `hint` that `text` stands for, or the text itself if it stands for none."""
    if hint is bool:
        return SWITCH.get(text.lower(), text)
    try:
        return hint(text)
    except ValueError:
        return text


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
