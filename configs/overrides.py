"""Words: YAML files and `key.sub=value` settings, merged into one plain dict whose scalars are still text."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import MissingFileError, UserError
from configs.foreign import reading
from configs.plain_yaml import PlainLoader

MOST_VALUES = 100_000  # of a file of settings


def merge_words(words: Sequence[str], resolve: bool = True) -> dict[str, Any]:
    """The settings of YAML files and `key=value` words, later ones winning, interpolations resolved or left as they
    stand. Values are texts (`configs.build` knows their types), lists, mappings and None; `~/` is the home folder.

    Raises ValueError or FileNotFoundError in one line.
    """
    found: dict[str, Any] = {}
    for word in words:
        found = merged(found, _read_word(word))
    found = _at_home(found)
    if not resolve:
        return found
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(found), resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"a value refers to something that is not there: {' '.join(str(error).split())}") from error


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `new` winning; settings within settings are merged too."""
    both = dict(old)
    for key, value in new.items():
        within, more = as_mapping(both.get(key)), as_mapping(value)
        # one of the two is a mapping already, so the setting is not a text that only looks like one
        deeper = isinstance(both.get(key), Mapping) or isinstance(value, Mapping)
        both[key] = merged(within, more) if deeper and within is not None and more is not None else value
    return both


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """The settings that `value` is or, as text `{a: b}`, stands for; none: None."""
    found = _parsed(value, "{")
    return found if isinstance(found, Mapping) else None


def as_sequence(value: Any) -> Sequence[Any] | None:
    """The list that `value` is or, as text `[a, b]`, stands for; none: None."""
    found = _parsed(value, "[")
    return found if isinstance(found, Sequence) and not isinstance(found, str) else None


def _parsed(value: Any, begins: str) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith(begins):
        return value
    try:
        return yaml.load(value, PlainLoader)
    except (yaml.YAMLError, RecursionError):
        return value


def _read_word(word: str) -> dict[str, Any]:
    if is_setting(word):
        key, _, value = word.partition("=")
        names = key.strip().split(".")
        if not all(names):
            raise UserError(f"cannot read the setting {word!r}: nothing may be empty before the =")
        settings: Any = at_home(value) or None  # `out=` is nothing, as `out:` is
        for name in reversed(names):
            settings = {name: settings}
        return settings
    if not word.endswith((".yaml", ".yml")):
        raise UserError(f"{word!r} is neither a YAML file nor key=value")
    if not Path(word).is_file():
        raise MissingFileError(f"no config file {word}")
    with reading(word, "correct it"):
        loaded = yaml.load(Path(word).read_text(encoding="utf-8-sig"), PlainLoader)
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"{word} must hold keys and values at its top level")
        if _unfolded(loaded, {}) > MOST_VALUES:
            raise UserError(f"{word} holds more than {MOST_VALUES} values, counted as often as aliases repeat them")
        OmegaConf.create(loaded or {})
        return loaded or {}


def is_setting(word: str) -> bool:
    """Whether it is `key=value` and no YAML file; the name of a file that is there may hold a `=`."""
    return "=" in word and not (word.endswith((".yaml", ".yml")) and Path(word).is_file())


def at_home(text: str) -> str:
    """`text` with the home folder for a `~` at its beginning, which a shell would have put there."""
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """How many values there are in `value`, those that aliases repeat counted each time, within itself once."""
    if id(value) not in known:
        known[id(value)] = 0
        within = [*value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else []
        known[id(value)] = 1 + sum(_unfolded(one, known) for one in within)
    return known[id(value)]


def _at_home(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _at_home(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return at_home(value) if isinstance(value, str) and value != "~" else value
