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
from configs.untrusted import SETTINGS_BYTES, reading

NULLS = ("~", "null", "Null", "NULL")
_NULL = ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"))


class TextLoader(yaml.SafeLoader):
    """Mappings, lists, texts and null. No aliases, which can make a huge file of a short one."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {first: [_NULL] for first in ("", *"~nN")}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "it has an alias (*)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            ((name, _),) = Counter(key.value for key, _ in node.value).most_common(1)
            raise ConstructorError(None, None, f"found duplicate key {name}", node.start_mark)
        return mapping


def merge_args(args: Sequence[str], resolve: bool = True) -> dict[str, Any]:
    """The settings of YAML files and `key=value` overrides, later ones winning, interpolations resolved if asked.
    Values are texts, lists, mappings and None; `~/` is the home folder."""
    settings: dict[str, Any] = {}
    for arg in args:
        settings = merged(settings, read_override(arg) if is_override(arg) else read_yaml(arg))
    settings = expand_home(settings)
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
    settings: Any = value or None
    for name in reversed(names):
        settings = {name: settings}
    return settings


def read_yaml(path: str) -> dict[str, Any]:
    """The settings in a YAML file of the user's."""
    if not path.endswith((".yaml", ".yml")):
        raise UserError(f"{path!r} is neither a YAML file nor key=value")
    with reading(path, "correct it"):
        settings = _load(path)
        OmegaConf.create(settings)  # raises for what is no interpolation
    return settings


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file that a program wrote, perhaps on another machine. Nothing in it is resolved: `${...}`
    could read this machine's environment and put it where the file's author sees it."""
    with reading(path):
        settings = _load(path)
        if "${" in json.dumps(settings):
            raise UserError(f"{path} refers to other values (${{...}}); a program's files hold plain ones")
    return settings


def _load(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"no config file {path}")
    if (size := file.stat().st_size) > SETTINGS_BYTES:
        raise UserError(f"{path} has {size} bytes; that is no file of settings")
    settings = yaml.load(file.read_text(encoding="utf-8-sig"), TextLoader)
    if not isinstance(settings, dict | None):
        raise UserError(f"{path} must hold keys and values at its top level")
    return settings or {}


def expand_home(value: Any) -> Any:
    """`value` with the home folder for the `~/` that its texts begin with, where no shell has put it."""
    if isinstance(value, Mapping):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
