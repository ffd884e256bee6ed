"""Imports: no cycles between files, and inside `experiments` each folder imports only earlier ones."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from experiments import ROOT

PACKAGES = ("diablo", "experiments", "eval", "analysis", "slurm")
# A module of a package may import from its own package and from those listed for it.
ALLOWED = {
    "diablo": (),
    "experiments": ("diablo",),
    "eval": ("diablo", "experiments"),
    "analysis": ("experiments",),
    "slurm": ("experiments",),
}
STARTS_EVERYTHING = ("experiments.reproduce",)  # imports eval and analysis inside its functions
FOLDERS = ("runs", "data", "models", "train", "plan", "speed", "reproduce", "gpu")
BASE_NAMES = ("", ".config", ".errors", ".open_fields", ".progress", ".rules", ".settings")
BASE = tuple(f"experiments{name}" for name in BASE_NAMES)
COMMANDS = (
    "experiments.card",
    "experiments.gguf",
    "experiments.merge",
    "experiments.methods",
    "experiments.quantize",
)  # commands outside the folders


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(module: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield our modules that a module imports, also inside functions, and whether the import is only for types."""
    only_types = {
        node
        for block in ast.walk(module)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(module):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in inside]
        yield from ((name, node in only_types) for name in names if name in modules())


def edges() -> Iterator[tuple[str, str]]:
    for name, module in modules().items():
        for other, only_types in imported(module):
            if not only_types and other != name:
                yield name, other


def is_command(name: str) -> bool:
    """Return whether a module is a command, which may import everything and is imported by nothing."""
    return name in COMMANDS or name.endswith(".__main__")


def folder(name: str) -> str:
    return name.split(".")[1] if name.startswith("experiments.") else ""


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {name: set() for name in modules()}
    for name, other in edges():
        graph[name].add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_packages_import_only_those_they_build_on() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, other in edges()
        if (package := other.split(".")[0]) != name.split(".")[0]
        and package not in ALLOWED[name.split(".")[0]]
        and not name.startswith(STARTS_EVERYTHING)
    ]
    assert not wrong


def test_each_folder_of_experiments_imports_only_those_before_it() -> None:
    order = {name: position for position, name in enumerate(FOLDERS)}
    known = {folder(name) for name in modules() if name.startswith("experiments.")}
    assert known == {*FOLDERS, *(name.split(".")[1] for name in (*BASE[1:], *COMMANDS))}
    wrong = []
    for name, other in edges():
        if not name.startswith("experiments") or not other.startswith("experiments"):
            continue
        if other in BASE or (is_command(name) and not is_command(other)):
            continue
        if name in BASE or is_command(other) or order[folder(other)] > order[folder(name)]:
            wrong.append(f"{name} imports {other}")
    assert not wrong


def test_the_tests_mirror_the_packages() -> None:
    """A folder of tests is named as the folder whose code it tests; beside them are tests of everything together."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert {path.parts[0] for path in folders} == set(PACKAGES)
    assert [path.as_posix() for path in folders if not any((ROOT / path).glob("*.py"))] == []


def test_the_map_of_the_code_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "code_map.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["page"](), "run `python docs/code_map.py`"
