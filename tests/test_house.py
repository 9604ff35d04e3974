"""The house rules: who may import whom, how large anything may be, and that every setting is used and documented."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from configs.cli import Verb

ROOT = Path(__file__).parent.parent
FLOORS = ("configs", "model", "data_pipeline", "sampling", "train", "launch")  # each may import those before it
LINES = {
    "configs": 1450, "model": 3495, "data_pipeline": 5850, "sampling": 2745, "train": 3075, "launch": 1490,
}  # fmt: skip
FILE_LINES, FUNCTION_LINES, ARGUMENTS = 300, 40, 6
# Function: why it is longer, or takes more.
LONG = {"model.action_dit.forward": "the network from its input to its output, with the official arguments"}
PROSE = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("configs/**/*.yaml"))]


@cache
def modules() -> dict[str, ast.Module]:
    """The code outside tests: trees by module name."""
    paths = [path for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in paths}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def path_of(module: str) -> Path:
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative import"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in modules() else node.module


def own_imports(module: str) -> set[str]:
    return {name for node in ast.walk(modules()[module]) for name in imported(node) if name.split(".")[0] in FLOORS}


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_imports_only_itself_and_those_below(folder: str) -> None:
    below = FLOORS[: FLOORS.index(folder) + 1]
    for module in modules():
        if module.split(".")[0] == folder:
            up = {name for name in own_imports(module) if name.split(".")[0] not in below}
            assert not up, f"{module} imports {up}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: own_imports(module) & modules().keys() for module in modules()}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys() - {module}}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph, f"a circle within {sorted(graph)}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_own_modules_are_imported_at_the_top(module: str) -> None:
    inside = {
        name
        for function in ast.walk(modules()[module])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        for name in imported(node)
        if name.split(".")[0] in FLOORS
    }
    assert not inside, f"{module} imports {inside} inside a function"


def verbs(folder: str) -> dict[str, Verb]:
    return getattr(import_module(f"{folder}.__main__"), "VERBS", {}) if f"{folder}.__main__" in modules() else {}


@pytest.mark.parametrize("folder", FLOORS)
def test_a_command_is_a_function_of_its_own_folder_or_one_for_developers(folder: str) -> None:
    for verb in verbs(folder).values():
        assert isinstance(verb.function, str) and verb.function.split(".")[0] in (folder, "tests")
        assert callable(verb.load())


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_keeps_its_budget_of_lines(folder: str) -> None:
    lines = {name: len(path_of(name).read_text().splitlines()) for name in modules() if name.split(".")[0] == folder}
    assert sum(lines.values()) <= LINES[folder]


@pytest.mark.parametrize("module", sorted(modules()))
def test_files_functions_and_arguments_are_few(module: str) -> None:
    assert len(path_of(module).read_text().splitlines()) <= FILE_LINES
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name, lines = f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES or name in LONG, f"{name} has {lines} lines"
            args = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([arg for arg in args if arg not in ("self", "cls")])
            assert count <= ARGUMENTS or name in LONG, f"{name} has {count} arguments"


def test_init_files_are_empty_or_a_registry() -> None:
    for module, tree in modules().items():
        if path_of(module).name == "__init__.py" and module != "configs":  # which is the loader itself
            assert not [node for node in tree.body if isinstance(node, ast.ClassDef)], module


def settings(config: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the settings of a config class, those of nested ones too."""
    hints = get_type_hints(config)
    for field in fields(config):
        if field.init:
            yield f"{where}{field.name}"
            for hint in (hints[field.name], *get_args(hints[field.name])):
                if is_dataclass(hint):
                    yield from settings(hint, f"{where}{field.name}.")


def command_configs() -> Iterator[Any]:
    for folder in FLOORS:
        for verb in verbs(folder).values():
            takes = next(iter(get_type_hints(verb.load()).values()), None)
            if is_dataclass(takes):
                yield takes


@cache
def documented() -> set[str]:
    """Every word that is a setting's name where it stands in a YAML, the README or docs."""
    text = "\n".join(path.read_text() for path in PROSE)
    return set(re.findall(r"([A-Za-z_]\w*)(?=\s*[:=`.\]}])", text))


@cache
def attributes_read() -> set[str]:
    return {node.attr for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        alias for path in ROOT.glob("tests/bench/*.py") for alias in re.findall(r"\.(\w+)", path.read_text())
    }


def test_every_setting_is_documented_and_read() -> None:
    names = {name for config in command_configs() for name in settings(config)}
    last = {name.rpartition(".")[2] for name in names}
    assert len(names) > 100
    assert not last - documented(), "in no YAML, README or docs page"
    assert not last - attributes_read(), "read nowhere"
