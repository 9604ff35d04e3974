"""One way to tell a program what to do: YAML files and key=value words, later ones winning, into a frozen dataclass."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.files import write_text
from configs.foreign import read_settings

T = TypeVar("T")


class MissingSettingError(ValueError):
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
    settings = OmegaConf.create(read_settings(path))
    settings.merge_with(OmegaConf.create(merge_words(words)))
    return build_from(cls, typing.cast(dict[str, Any], OmegaConf.to_container(settings)), path)


def build_from(cls: type[T], values: Mapping[str, Any], file: str | Path) -> T:
    """As `build` of what `file` holds, which errors name."""
    try:
        return build(cls, values)
    except MissingSettingError as error:
        raise ValueError(f"{file} lacks {error.key!r}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def merge_words(words: Sequence[str], resolve: bool = True) -> dict[str, Any]:
    """YAML files and `key=value` words merged into one plain dict, interpolations resolved or left as they stand."""
    merged = OmegaConf.create()
    for word in words:
        merged.merge_with(_read_word(word))
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=resolve))
    except OmegaConfBaseException as error:
        raise ValueError(f"a value refers to something that is not there: {error}") from error


def _read_word(word: str) -> Any:
    key, equals, _ = word.partition("=")
    if equals and not key.endswith((".yaml", ".yml")):
        try:
            return OmegaConf.from_dotlist([word])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"cannot read the setting {word!r}: {' '.join(str(error).split())}") from error
    if not word.endswith((".yaml", ".yml")):
        raise ValueError(f"{word!r} is neither a YAML file nor key=value")
    if not Path(word).is_file():
        raise FileNotFoundError(f"no config file {word}")
    try:
        loaded = OmegaConf.load(word)
    except yaml.YAMLError as error:
        raise ValueError(f"{word} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(loaded):
        raise ValueError(f"{word} must hold keys and values at its top level")
    return loaded


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `cls` (nested ones too) from plain `values`; `where` is the dotted path used in errors."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in fields(typing.cast(Any, cls)) if field.init]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {where + near[0]!r}?" if near else f"known here: {', '.join(names)}"
            raise ValueError(f"unknown config key {where + str(key)!r}; {hint}")
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
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} holds settings of its own; {value!r} is none")
        return build(typing.cast(type, hint), typing.cast(Mapping[str, Any], value), f"{where}.")
    if origin is tuple or origin is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{where} must be a list, not {value!r}")
        item_hints = [args[0]] * len(value) if origin is list or args[-1] is Ellipsis else list(args)
        if len(item_hints) != len(value):
            raise ValueError(f"{where} needs {len(item_hints)} values, not {len(value)}")
        items = [
            _convert(item, one, f"{where}[{i}]") for i, (item, one) in enumerate(zip(item_hints, value, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, not {value!r}")
        return {str(key): _convert(args[1], one, f"{where}.{key}") for key, one in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
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
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value


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
