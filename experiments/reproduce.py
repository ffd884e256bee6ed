"""Plan, train, score and report an experiment, in one process.

    python -m experiments.reproduce quickstart
    python -m experiments.reproduce quickstart seed=0,1,2,3,4 --out report/five_seeds

Finished runs are skipped and interrupted ones resumed, so the same command is also how an experiment is continued.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from experiments.errors import UserError, run_command
from experiments.plan import plan, read_experiment, write_runs

Config = dict[str, Any]


def reproduce(name: str, overrides: list[str], out: Path | None = None) -> Path:
    """Run every stage of `configs/experiment/<name>.yaml` and return the path of the report's page."""
    started = time.perf_counter()
    experiment = read_experiment(name)
    configs = plan([f"experiment={name}", *overrides])
    runs = write_runs(configs)
    print(f"{experiment['title']}: {len(runs)} runs in {runs[0].root.parent}", flush=True)

    # These three come late and only here: experiments is what eval and analysis stand on.
    from analysis.report import write_report
    from eval.run import check_data, evaluate
    from experiments.timing import measure_step_times
    from experiments.train import train

    for config in {config["task"]["name"]: config for config in configs}.values():
        check_data(config)  # what is missing is told before the first run is trained
    failures = []
    for number, run in enumerate(runs, start=1):
        title = f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.root.name}"
        try:
            before = time.perf_counter()
            train(run, progress=title)
            scores = evaluate(run, progress=True)
            took = time.perf_counter() - before
        except UserError as error:
            failures.append(f"{run.root.name}: {error}")
            print(f"{title}  failed: {error}", file=sys.stderr, flush=True)
            continue
        results = ", ".join(_short(score) for score in scores)
        print(f"{title}  {results}  ({took:.1f} s)", flush=True)
    if len(failures) == len(runs):
        raise UserError(f"no run of {name} finished; the first: {failures[0]}")
    # A label stands for one method only within a task: another task adapts other modules.
    one_task = len({config["task"]["name"] for config in configs}) == 1
    step_times = measure_step_times(configs, runs[0].root.parent / "step_times") if one_task else None
    page = write_report(
        [run.root for run in runs],
        out or Path("report") / name,
        step_times,
        experiment["title"],
        experiment.get("notes", []),
    )
    print(f"report: {page.resolve()}  ({time.perf_counter() - started:.0f} s in all)")
    if failures:
        raise UserError(f"{len(failures)} of {len(runs)} runs failed and are missing from the report")
    return page


def _short(score: Any) -> str:
    metric = "" if score.metric == "accuracy" else f"{score.metric} "
    return f"{score.benchmark} {metric}{score.accuracy:.1%}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="a file of configs/experiment, without its ending")
    parser.add_argument("overrides", nargs="*", help="key=value or key=a,b,c, applied to every grid")
    parser.add_argument("--out", type=Path, help="folder of the report; default: report/<experiment>")
    options = parser.parse_intermixed_args(arguments)
    reproduce(options.experiment, options.overrides, options.out)


if __name__ == "__main__":
    run_command(main)
