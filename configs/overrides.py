"""Command-line arguments as nested settings: YAML files and `key.sub=value` overrides, later ones winning.

Scalars stay the text that was written, and the setting's type says what it means (`configs.build`): YAML 1.1 makes a
bool of `no`, a number of `007` and a date of 2026-01-01.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from configs.errors import MissingFileError, UserError
from configs.foreign import SETTINGS_BYTES, reading

MOST_VALUES = 100_000  # of a file of settings, counted as often as aliases repeat them
NULLS = ("~", "null", "Null", "NULL")
_NULL = ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"))
_MERGE = ("tag:yaml.org,2002:merge", re.compile(r"<<$"))


class TextLoader(yaml.SafeLoader):
    """Mappings, lists, texts and null."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {**{first: [_NULL] for first in ("", *"~nN")}, "<": [_MERGE]}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(names) < len(node.value):
            raise ConstructorError(None, None, "a key is not a text", node.start_mark)
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ConstructorError(None, None, f"found duplicate key {repeated[0]}", node.start_mark)
        return super().construct_mapping(node, deep)


class ForeignLoader(TextLoader):
    """Without aliases, which can make a huge file of a short one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "it has an alias (*)", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def merge_args(args: Sequence[str], resolve: bool = True) -> dict[str, Any]:
    """The settings of YAML files and `key=value` overrides, later ones winning, interpolations resolved unless told
    otherwise. Values are texts, lists, mappings and None; `~/` is the home folder."""
    settings: dict[str, Any] = {}
    for arg in args:
        settings = merged(settings, read_override(arg) if is_override(arg) else read_yaml(arg))
    settings = _expand_home(settings)
    if not resolve:
        return settings
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(settings), resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"a value refers to something that is not there: {' '.join(str(error).split())}") from error


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `new` winning; settings within settings are merged too."""
    both = dict(old)
    for key, value in new.items():
        before = both.get(key)
        if isinstance(before, Mapping) or isinstance(value, Mapping):  # else a text may only look like a mapping
            inner, more = parse_container(before), parse_container(value)
            if isinstance(inner, Mapping) and isinstance(more, Mapping):
                value = merged(inner, more)
        both[key] = value
    return both


def parse_container(value: Any) -> Any:
    """The mapping or list that the text `{a: b}` or `[a, b]` stands for; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return yaml.load(value, TextLoader)
    except (yaml.YAMLError, RecursionError):
        return value


def is_override(arg: str) -> bool:
    """Whether `arg` is `key=value` and no YAML file, whose path may hold a `=`."""
    return "=" in arg and not (arg.endswith((".yaml", ".yml")) and Path(arg).is_file())


def read_override(arg: str) -> dict[str, Any]:
    """The settings that `key.sub=value` stands for; an empty value is none."""
    key, _, value = arg.partition("=")
    names = key.strip().split(".")
    if not all(names):
        raise UserError(f"cannot read the setting {arg!r}: nothing may be empty before the =")
    settings: Any = expand_home(value) or None
    for name in reversed(names):
        settings = {name: settings}
    return settings


def read_yaml(path: str) -> dict[str, Any]:
    """The settings in a YAML file of the user's."""
    if not path.endswith((".yaml", ".yml")):
        raise UserError(f"{path!r} is neither a YAML file nor key=value")
    with reading(path, "correct it"):
        settings = _load(path, TextLoader)
        if _unfolded(settings, {}) > MOST_VALUES:
            raise UserError(f"{path} holds more than {MOST_VALUES} values, counted as often as aliases repeat them")
        OmegaConf.create(settings)  # raises for what is no interpolation
    return settings


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file that a program wrote, perhaps on another machine. Nothing in it is resolved: `${...}`
    could read this machine's environment and put it where the file's author sees it."""
    with reading(path):
        settings = _load(path, ForeignLoader)
        plain = json.dumps(settings, ensure_ascii=False)
        if "${" in plain:
            reference = plain[plain.index("${") :][:80]
            raise UserError(f"{path} refers to {reference}; files of checkpoints and codecs hold plain values")
    return settings


def _load(path: str | Path, loader: type[TextLoader]) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"no config file {path}")
    if (size := file.stat().st_size) > SETTINGS_BYTES:
        raise UserError(f"{path} has {size} bytes; that is no file of settings")
    settings = yaml.load(file.read_text(encoding="utf-8-sig"), loader)
    if not isinstance(settings, dict | None):
        raise UserError(f"{path} must hold keys and values at its top level")
    return settings or {}


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """How many values there are in `value`, those that aliases repeat counted each time, within itself once."""
    if id(value) not in known:
        known[id(value)] = 0
        children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        known[id(value)] = 1 + sum(_unfolded(child, known) for child in children)
    return known[id(value)]


def expand_home(text: str) -> str:
    """`text` with the home folder for a `~` at its beginning, where a shell would have put it."""
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _expand_home(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return expand_home(value) if isinstance(value, str) and value != "~" else value
