"""Writes docs/results.md from the committed records in results/: every number is read or computed, none is typed.

    python -m analysis.results_page

The prose is `analysis/results.md.j2`; tables and numbers are the functions of `analysis.results_tables`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments import ROOT
from experiments.errors import run_command

PAGE = ROOT / "docs" / "results.md"
TEMPLATE = ROOT / "analysis" / "results.md.j2"


def page() -> str:
    """Return the page in Markdown; its figures are files in results/."""
    import jinja2

    from analysis import results_speed, results_tables

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals.update(results_tables.FUNCTIONS, **results_speed.FUNCTIONS)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.results_page", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/results.md")
    options = parser.parse_args(arguments)
    options.out.write_text(page(), encoding="utf-8")
    print(f"page: {options.out}")


if __name__ == "__main__":
    run_command(main)
