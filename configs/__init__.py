"""One way to tell a program what to do: YAML files and key=value words, later ones winning, into a frozen dataclass."""

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from configs.errors import UserError
from configs.files import write_text
from configs.foreign import read_settings
from configs.overrides import as_mapping, as_sequence, merge_words, merged

T = TypeVar("T")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as YAML has it


class MissingSettingError(UserError):
    """A required key that nobody gave."""

    def __init__(self, key: str) -> None:
        super().__init__(f"config key {key!r} is required: give {key}=...")
        self.key = key


def load_config(cls: type[T], words: Sequence[str]) -> T:
    """The dataclass `cls` from `words`: paths of YAML files and `key.sub=value` settings, later ones winning.

    Raises ValueError in one line: a file that is not there, a mistyped key (with the nearest right one), a value of
    the wrong type, a required key that nobody gave.
    """
    return build(cls, merge_words(words))


def load_file(cls: type[T], path: str | Path, words: Sequence[str] = ()) -> T:
    """The dataclass `cls` from the YAML file `path` that a program wrote, in which nothing is resolved; the user's
    `words` change its settings. Raises ValueError in one line that names the file."""
    return build_from(cls, merged(read_settings(path), merge_words(words)), path)


def build_from(cls: type[T], values: Mapping[str, Any], file: str | Path) -> T:
    """As `build` of what `file` holds, which errors name."""
    try:
        return build(cls, values)
    except MissingSettingError as error:
        raise UserError(f"{file} lacks {error.key!r}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `cls` (nested ones too) from plain `values`; `where` is the dotted path used in errors.

    A value may be the text that stands for it in a word or in YAML. A setting whose type is a text takes it as it is.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in fields(typing.cast(Any, cls)) if field.init]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {where + near[0]!r}?" if near else f"known here: {', '.join(names)}"
            raise UserError(f"unknown setting {where + str(key)!r}; {hint}")
    for field in fields(typing.cast(Any, cls)):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise MissingSettingError(where + field.name)
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if str(value) not in map(str, args):
            raise UserError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
        return next(one for one in args if str(one) == str(value))
    if is_dataclass(hint):
        settings = as_mapping(value)
        if settings is None:
            raise UserError(f"{where} holds settings of its own; {value!r} is none")
        return build(typing.cast(type, hint), settings, f"{where}.")
    if origin is tuple or origin is list:
        many = as_sequence(value)
        if many is None:
            raise UserError(f"{where} must be a list, not {value!r}")
        item_hints = [args[0]] * len(many) if origin is list or args[-1] is Ellipsis else list(args)
        if len(item_hints) != len(many):
            raise UserError(f"{where} needs {len(item_hints)} values, not {len(many)}")
        items = [
            _convert(item, one, f"{where}[{i}]") for i, (item, one) in enumerate(zip(item_hints, many, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        settings = as_mapping(value)
        if settings is None:
            raise UserError(f"{where} must be a mapping, not {value!r}")
        return {str(key): _convert(args[1], one, f"{where}.{key}") for key, one in settings.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in args and (value is None or value in ("~", "null", "Null", "NULL")):
        return None
    first_error: ValueError | None = None
    for option in (option for option in args if option is not type(None)):
        try:
            return _convert(option, value, where)
        except ValueError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if isinstance(value, str) and hint is not str:
        value = _meant(hint, value.strip())
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be of type {hint.__name__}, not {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} must be a number of at most 64 bits, not {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}")
    return value


def _meant(hint: type, text: str) -> Any:
    """The value of type `hint` that `text` stands for, or the text itself if it stands for none."""
    if hint is bool:
        return SWITCH.get(text.lower(), text)
    if not re.fullmatch(r"[-+]?[0-9._]*([eE][-+]?[0-9]+)?", text, re.ASCII) or len(text) > 400:
        return text
    try:
        return int(text) if hint is int else float(text)
    except ValueError:
        return text


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dict that `build` turns back into `config`; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return plain(asdict(config))


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings as one dict of dotted names."""
    found = {}
    for key, value in config.items():
        name = f"{where}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def save_config(config: Any, path: str | Path) -> None:
    """Writes the resolved dataclass as YAML that `load_config` reads back to an equal one."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
