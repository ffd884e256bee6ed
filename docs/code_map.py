"""Writes the tree in docs/code.md from the first line of every module's docstring: `python docs/code_map.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "code.md"
PACKAGES = ("diablo", "experiments", "eval", "analysis", "slurm")
FENCE = "```"


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """A line for the folder, its modules and its folders, indented by depth."""
    yield _line(f"{folder.name}/", folder / "__init__.py", depth)
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield _line(path.name, path, depth + 1)
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from lines(inner, depth + 1)


def _line(name: str, path: Path, depth: int) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path}: no docstring"
    first = " ".join(docstring.split("\n\n")[0].split()).removesuffix(".")
    return f"{'  ' * depth}{name}".ljust(26) + f"  {first}"


def page() -> str:
    """The page with the tree of today between its fences."""
    before, _, after = PAGE.read_text(encoding="utf-8").split(FENCE)
    tree = "\n".join(line for package in PACKAGES for line in lines(ROOT / package))
    return f"{before}{FENCE}\n{tree}\n{FENCE}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
