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

YAML = (".yaml", ".yml")
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
        settings = merged(settings, _read_override(arg) if is_override(arg) else read_settings(arg, references=True))
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
        before, after = parse_container(old.get(key)), parse_container(value)
        both[key] = merged(before, after) if isinstance(before, Mapping) and isinstance(after, Mapping) else value
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
    return "=" in arg and not (arg.endswith(YAML) and Path(arg).is_file())


def _read_override(arg: str) -> dict[str, Any]:
    key, _, value = arg.partition("=")
    names = key.strip().split(".")
    if not all(names):
        raise UserError(f"cannot read the setting {arg!r}: nothing may be empty before the =")
    settings: Any = value or None
    for name in reversed(names):
        settings = {name: settings}
    return settings


def read_settings(path: str | Path, references: bool = False) -> dict[str, Any]:
    """The settings in a YAML file. `references` to other values (`${...}`) are allowed in a file of the user's: in one
    that was written elsewhere, they could put this machine's environment where its author sees it."""
    if not str(path).endswith(YAML):
        raise UserError(f"{str(path)!r} is neither a YAML file nor key=value")
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"no config file {path}")
    if (size := file.stat().st_size) > SETTINGS_BYTES:
        raise UserError(f"{path} has {size} bytes; that is no file of settings")
    with reading(path, "correct it or write it again"):
        settings = yaml.load(file.read_text(encoding="utf-8-sig"), TextLoader) or {}
        if not isinstance(settings, dict):
            raise UserError(f"{path} must hold keys and values at its top level")
        if references:
            OmegaConf.create(settings)  # raises for what is no interpolation
        elif "${" in json.dumps(settings):
            raise UserError(f"{path} refers to other values (${{...}}); a program's files hold plain ones")
    return settings


def expand_home(value: Any) -> Any:
    """`value` with the home folder for the `~/` that its texts begin with, where no shell has put it."""
    if isinstance(value, Mapping):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
