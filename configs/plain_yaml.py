"""YAML as it stands: scalars stay the text that was written, and the setting's type says what that text means."""

import re
from collections import Counter
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

_NULL = ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"))
_MERGE = ("tag:yaml.org,2002:merge", re.compile(r"<<$"))


class PlainLoader(yaml.SafeLoader):
    """Mappings, lists, texts and null. YAML 1.1 makes a bool of `no`, a number of `007` and a date of 2026-01-01."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        "": [_NULL],
        "~": [_NULL],
        "n": [_NULL],
        "N": [_NULL],
        "<": [_MERGE],
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(names) < len(node.value):
            raise ConstructorError(None, None, "a key is no text", node.start_mark)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ConstructorError(None, None, f"found duplicate key {twice[0]}", node.start_mark)
        return super().construct_mapping(node, deep)


class ForeignLoader(PlainLoader):
    """Without references: by them a short file becomes a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "it has an alias (*)", self.peek_event().start_mark)
        return super().compose_node(parent, index)
