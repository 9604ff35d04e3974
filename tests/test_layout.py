"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "model", "data_pipeline", "sampling", "train", "launch")
ALLOWED = {
    "configs": {"configs"},
    "model": {"model", "configs"},
    "data_pipeline": {"data_pipeline", "configs", "model"},
    "sampling": {"sampling", "configs", "model", "data_pipeline"},
    "train": {"train", "configs", "model", "data_pipeline", "sampling"},
    "launch": {"launch", "configs", "model", "data_pipeline", "train"},
}


def imported_folders(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_the_map_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        name = str(path.relative_to(ROOT))
        assert imported_folders(path) <= ALLOWED[folder], name


def test_init_files_are_empty_or_a_registry() -> None:
    for path in sorted(ROOT.glob("*/**/__init__.py")):
        if path.relative_to(ROOT).parts[0] not in FOLDERS or path.parent.name == "configs":
            continue  # configs/__init__.py is the loader itself
        tree = ast.parse(path.read_text())
        assert not [node for node in tree.body if isinstance(node, ast.ClassDef)], path
