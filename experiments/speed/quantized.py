"""Measures the cost of quantised models: time to quantise, time to train, and memory.

    python -m experiments.speed.quantized                          # minutes on two cores
    python -m experiments.speed.quantized --suites memory --bits 2

Four suites: `quantise` (each method on one decoder layer's weights, and GPTQ against a plain loop over columns),
`errors` (experiments/speed/quantize_errors.py), `step` (a training step on the quantised and on the full-precision
base, in alternating rounds) and `memory` (a model with random weights, built and packed decoder layer by decoder layer:
the peak of the process, and the bytes of the same model in fp16). Models and inputs are random, except in `errors`.
Writes `quantize_benchmark.json` and `.md` into --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import run_command

SUITES = ("quantise", "errors", "step", "memory")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.quantized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence, in calibration and training")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per training pass")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--num-blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="device of the training passes: auto, cpu or cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for trying out the command")
    parser.add_argument("--out", type=Path, default=Path("report") / "quantize_benchmark")
    options = parser.parse_args(arguments)
    from experiments.speed.quantized_models import run

    print(run(options))


if __name__ == "__main__":
    run_command(main)
