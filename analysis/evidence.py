"""Writes the page that answers the questions of docs/evidence.md from its runs, by the tests registered there.

    python -m analysis.evidence results/evidence/runs --spectra results/evidence/spectra/* --out results/evidence

Writes evidence.md with its figures, settings.csv and comparisons.csv. Unfinished settings are listed as not run, so the
page can be made at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import run_command


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report") / "evidence")
    parser.add_argument("--spectra", type=Path, metavar="RUN", help="run that measured spectra, for question (h)")
    options = parser.parse_args(arguments)

    from analysis.evidence_page import write_evidence
    from analysis.load import find_runs

    print(f"page: {write_evidence(find_runs(options.runs), options.out, options.spectra)}")


if __name__ == "__main__":
    run_command(main)
