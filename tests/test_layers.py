"""Imports between the package's folders go downwards only, without cycles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers.small import ROOT

PACKAGE = ROOT / "vit_static"
PEERS = PACKAGE / "bench" / "peers"  # scripts for other environments, which import nothing of the package
# From the top down; a folder may import from those below it.
LAYERS = [
    "worker",
    "__main__",
    "api",
    "cli",
    "verbs",
    "doctor",
    "bench",
    "probe",
    "export",
    "inference",
    "train",
    "plan",
    "program",
    "weights",
    "checkpoint",
    "optim",
    "parallel",
    "data",
    "model",
    "report",
    "launch",
    "config",
    "common",
    "__init__",
]
WITHOUT_PADDLE = ["report", "launch", "config", "common"]  # but for common/startup.py, which imports it on request
COMMON = {
    "errors",
    "io",
    "startup",
    "library_output",
    "cpu",
    "hardware",
    "text",
    "drawing",
    "terminal",
    "installation",
}  # a closed list


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != PEERS]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def imports_of(path: Path) -> set[str]:
    """The full names of the modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their names below it."""
    known, found = modules(), set()
    for name in imports_of(path):
        below = name.removeprefix("vit_static.")
        if below != name:
            found |= {module for module in (below, below.rpartition(".")[0]) if module in known}
    return found


def folder(module: str) -> str:
    return module.partition(".")[0]


def test_every_folder_has_a_layer() -> None:
    assert {folder(module) for module in modules()} == set(LAYERS)


def test_no_import_goes_up() -> None:
    level = {name: number for number, name in enumerate(LAYERS)}
    upward = [
        (module, other)
        for module, path in modules().items()
        for other in imported_modules(path)
        if module != "__init__"  # the public face, which imports what it offers when that is called
        if level[folder(other)] < level[folder(module)]
    ]
    assert not upward


def test_no_cycle() -> None:
    graph = {module: imported_modules(path) - {module} for module, path in modules().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", WITHOUT_PADDLE)
def test_the_lowest_folders_do_without_paddle_and_dali(name: str) -> None:
    for module, path in modules().items():
        if folder(module) == name and module != "common.startup":
            heavy = {imported for imported in imports_of(path) if folder(imported) in ("paddle", "nvidia")}
            assert not heavy, module


def test_common_is_a_closed_list() -> None:
    assert {path.stem for path in (PACKAGE / "common").glob("[a-z]*.py")} == COMMON


def test_no_folder_or_file_is_a_drawer() -> None:
    """A name that says nothing about its content: except the fixtures' folder of the tests."""
    for path in (*PACKAGE.rglob("*"), *(ROOT / "data_tools").rglob("*"), *(ROOT / "tests").rglob("*")):
        assert path.stem not in ("utils", "util", "helpers", "misc", "tmp") or path == ROOT / "tests" / "helpers", path


def test_the_package_imports_no_data_tool() -> None:
    for module, path in modules().items():
        assert not {name for name in imports_of(path) if folder(name) == "data_tools"}, module


def test_the_peers_import_nothing_of_the_package() -> None:
    """They run in environments that don't have what the package needs, and import each other as scripts do."""
    paths = list(PEERS.glob("*.py"))
    assert len(paths) > 5
    for path in paths:
        assert not {name for name in imports_of(path) if folder(name) == "vit_static"}, path


def test_no_test_imports_from_another_test_file() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("test_")], path
