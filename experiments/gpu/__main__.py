"""Runs all GPU checks and a queue of runs within a few minutes on a borrowed GPU.

    python -m experiments.gpu --minutes 8 --out report/gpu
    python -m experiments.gpu --minutes 8 --queue quickstart    # then runs of that experiment until the time is up
    python -m experiments.gpu --minutes 8 --device cpu          # dry run: every part at the smallest sizes

Five parts, in this order, each in a separate process, so that a crash affects only its own part:

correctness  `pytest -m cuda`: gradients, optimizers, merging, checkpointing, compile and bf16 against float64
methods      every method and every quantiser, trained for a few steps and scored by the real pipeline
resume       a killed and resumed run against uninterrupted ones: how many bits of the adapter differ, and where
speed        whole models and single layers, every method in turn (experiments/speed/layers.py)
queue        runs of the experiment given by --queue, in its order

A part writes <out>/<part>.json as it goes: versions, device, commit, and every item with its seconds and result or
error. An item starts only if it fits into the time left, judged by its seconds in the part's last record in <out>
(which is kept under another name) or else by an estimate. <out>/gpu.json is a summary. Files are written to <out>, with
the runs of the queue in <out>/runs, and to the cache. No network is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import UserError, run_command
from experiments.gpu.processes import PARTS, probe, run_parts


def read_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value for the runs of methods, resume and queue")
    parser.add_argument("--minutes", type=float, default=8.0, help="total time; default: 8")
    parser.add_argument("--out", type=Path, default=Path("report") / "gpu")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the smallest sizes; default: cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these, in this order")
    parser.add_argument("--queue", metavar="EXPERIMENT", help="a file of configs/experiment, or the path of another")
    parser.add_argument("--workers", type=int, default=1, help="runs of the queue at a time; default: 1")
    parser.add_argument("--results", type=Path, help="exported runs that count as finished in the queue")
    parser.add_argument("--authors-repo", type=Path, help="checkout of ziyangjoy/DiaBlo; its layer is timed too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # run this part here, until a given time
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g}: give more than 0")
    if options.queue is not None:
        from experiments.plan.experiment_files import read_experiment

        read_experiment(options.queue)  # reports a misspelt name before the first part
    return options


def main(arguments: list[str]) -> int:
    options = read_options(arguments)
    if options.part:
        from experiments.gpu.parts import run_part

        run_part(options.part, options)
        return 0
    if options.device != "cpu":
        options.out.mkdir(parents=True, exist_ok=True)
        failure = probe(options.device, options.out, 120.0)
        if failure:
            raise UserError(
                f"--device {options.device}: no CUDA device answers here ({failure}): use --device cpu for a dry run"
            )
    options.out = options.out.resolve()
    summary = run_parts(options, [*arguments, "--out", str(options.out)])
    print(f"records: {options.out}")
    return int(any(outcome["status"] == "failed" for outcome in summary))


if __name__ == "__main__":
    run_command(main)
