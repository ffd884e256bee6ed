"""Quantises base models before the runs that train on them.

    python -m experiments.quantize runs/<run_id>
    python -m experiments.quantize model=llama2_7b task=math_10k method=diablo quantization=magr quantization.bits=4,2

A run makes its base if it is missing; made in advance, many runs can start at once. An interrupted quantisation resumes
after the last finished layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.config import RunConfig
from experiments.errors import UserError, run_command
from experiments.plan.compose import plan
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, content_hash


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", metavar="RUN | key=value", help="run directories, or arguments of plan")
    given = parser.parse_intermixed_args(arguments).overrides
    from diablo.quantize.storage import read_record
    from experiments.models.quantized import make_quantized
    from experiments.models.shapes import resolve_device

    if all(Path(text).is_dir() for text in given):
        configs = [read_config(RunPaths(Path(text).resolve())) for text in given]
    else:
        configs = plan(given)
    wanted: dict[str, RunConfig] = {}
    for config in configs:
        if config.quantization is not None:
            decides = [config.mapping[key] for key in ("model", "quantization", "protocol")]
            wanted.setdefault(content_hash([config.mapping["task"]["data"], *decides]), config)
    if not wanted:
        raise UserError("no run here has a quantised base: give quantization=nf, gptq, magr, …")
    for config in wanted.values():
        folder = make_quantized(config, str(resolve_device(config.runtime.device)))
        record = read_record(folder)
        assert record is not None
        print(
            f"{folder}: {record['bits_per_weight']:.3f} bits per quantised weight, {record['quantized_bytes']:,} bytes "
            f"and {record['other_bytes']:,} of full precision, hash {record['hash'][:12]}"
        )


if __name__ == "__main__":
    run_command(main)
