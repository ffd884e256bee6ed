"""Measures speed and memory of DiaBlo and the other methods in one run.

    python -m experiments.speed.layers                                  # on the GPU if there is one, else on the CPU
    python -m experiments.speed.layers --suites models --models llama2_7b llama3_8b --tokens 4096 8192 16384
    python -m experiments.speed.layers --suites models --patterns       # the sparse patterns instead of the methods
    python -m experiments.speed.layers --authors-repo ../DiaBlo         # also the layer in this checkout
    python -m experiments.speed.layers --redraw results/benchmark_cpu/benchmark.json    # measures nothing

Three suites: `layers` (single linear layers with the shapes of real models), `models` (whole models, random weights)
and `curve` (N against rank at equal budgets). Every case measures all methods in turn, in rounds; ratios to the frozen
floor are taken within a round. Writes `benchmark.json`, `.md` (the table), `.png` and `.svg` into --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import run_command
from experiments.runs.records import read_json

SUITES = ("layers", "models", "curve")


def shape(text: str) -> tuple[int, int]:
    try:
        m, n = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write in_features x out_features, e.g. 4096x11008") from None
    return m, n


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="files in configs/model, or llama_100m")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="INxOUT", help="shapes for the layers suite")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per pass; default 512 on the CPU, 4096 … on CUDA")
    parser.add_argument("--length", type=int, default=512, help="tokens per row in the models suite")
    parser.add_argument("--num-blocks", type=int, help="N; default 64, 32 for llama_100m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--patterns", action="store_true", help="sparse patterns at density 1/N instead of methods")
    parser.add_argument(
        "--authors-repo", type=Path, help="checkout of ziyangjoy/DiaBlo; its layer is imported and timed"
    )
    parser.add_argument("--out", type=Path, default=Path("report") / "benchmark")
    parser.add_argument(
        "--redraw", type=Path, metavar="JSON", help="only write the table and picture of this measurement, next to it"
    )
    options = parser.parse_args(arguments)
    if options.redraw is not None:
        from experiments.speed.report import write_report

        print(write_report(read_json(options.redraw), options.redraw.parent))
        return
    from experiments.speed.layer_passes import run

    print(run(options))


if __name__ == "__main__":
    run_command(main)
