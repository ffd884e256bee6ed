"""Writes the generated parts of these pages: `python docs/pages.py`. Results take half a minute, the others seconds.

A part stands between two comments in its page; results.md is written as a whole (analysis/results_page.py), and the
tree in code.md by docs/code_map.py.
"""

from __future__ import annotations

import csv
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
END = "<!-- end of generated -->"


def capabilities() -> str:
    from experiments.methods import as_markdown, table

    return as_markdown(table())


def differences() -> str:
    with (ROOT / "analysis" / "differences.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [f"| {row['where']} | {row['there']} | {row['here']} |" for row in rows]
    return "\n".join(["| | there | here |", "|---|---|---|", *cells])


def settings() -> str:
    """Return every section as `--help-config` explains it, as lists, with the values of the default choices."""
    from experiments.plan.compose import plan
    from experiments.plan.explain import explain
    from experiments.settings import SECTIONS

    chosen = ["quantization=gptq", "spectra.every=10"]  # sections that a run without them has not
    (config,) = plan(chosen)
    # These two depend on the machine.
    runtime = {**config.mapping["runtime"], "data_root": "$DIABLO_DATA_ROOT", "cache_dir": "~/.cache/diablo"}
    mapping = {**config.mapping, "runtime": runtime}
    about = f"The values are those of the default choices with `{' '.join(chosen)}`."
    return "\n\n".join([about, *(f"## {name}\n\n{_listed(explain(name, mapping))}" for name in SECTIONS)])


def _listed(lines: Iterable[str]) -> str:
    """Return the lines of `--help-config`, a setting and below it its meaning, as a list."""
    intro: list[str] = []
    items: list[tuple[str, list[str]]] = []
    for line in lines:
        setting = re.fullmatch(r"\s*(\w+(?:\.\w+)+)(?: = (.*))?", line)
        if setting:
            items.append((f"`{setting[1]}`{f' = `{setting[2]}`' if setting[2] else ''}", []))
        elif line.strip():
            (items[-1][1] if items else intro).append(line.strip())
    bullets = [f"* {setting}" + (f": {' '.join(meaning)}" if meaning else "") for setting, meaning in items]
    return "\n".join([" ".join(intro), "", *bullets])


PARTS: dict[str, Callable[[], str]] = {
    "capabilities": capabilities,
    "differences": differences,
    "settings": settings,
}


def pages() -> Iterator[tuple[Path, Callable[[], str]]]:
    """Yield every page that is generated, in part or as a whole, with the function that returns its text."""
    for name, part in PARTS.items():
        path = DOCS / f"{name}.md"
        yield path, lambda path=path, name=name, part=part: _filled(path.read_text(encoding="utf-8"), name, part())
    code_map = runpy.run_path(str(DOCS / "code_map.py"))
    yield code_map["PAGE"], code_map["page"]

    from analysis.results_page import PAGE, page

    yield PAGE, page


def _filled(text: str, name: str, part: str) -> str:
    start = f"<!-- generated: {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(END)
    return f"{before}{start}\n\n{part}\n\n{END}{after}"


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text(), encoding="utf-8")
        print(path.relative_to(ROOT))
