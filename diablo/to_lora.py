"""Converts a trained adapter of blocks to an ordinary LoRA adapter, for servers that load LoRA only.

    python -m diablo.to_lora ADAPTER OUT               # exact; its rank is as large as the layers are wide
    python -m diablo.to_lora ADAPTER OUT --rank 64     # the best approximation of rank 64, with its error

OUT loads in PEFT without diablo. Servers limit the rank: vLLM 0.32 takes up to 512, if started with --enable-lora and
--max-lora-rank. Errors are |D - B A| / |D| in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

LARGE = 0.1  # relative error above which the command says so
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diablo.to_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, help="folder of a DiaBlo, sparse, SMT or S2FT adapter")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--rank", type=int, help="largest rank of a layer; default: as large as exactness needs")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the factors; default: %(default)s")
    parser.add_argument("--base", help="hub id or folder of the base model; default: the one that the adapter names")
    parser.add_argument("--layers", action="store_true", help="print the rank and the error of every layer")
    options = parser.parse_args()
    import torch  # after the arguments: it takes seconds

    from diablo.low_rank import to_lora

    try:
        done = to_lora(options.adapter, options.out, options.rank, getattr(torch, options.dtype), options.base)
    except (ValueError, OSError) as error:
        from diablo.authors import one_line

        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    if options.layers:
        width = max(map(len, done.ranks))
        for name, rank in done.ranks.items():
            print(f"{name:{width}}  rank {rank:4d}  error {done.errors[name]:.2e}")
    ranks, errors = sorted(set(done.ranks.values())), done.errors
    worst = max(errors, key=lambda name: errors[name])
    print(f"layers: {len(errors)}, of rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}")
    print(f"error of a layer: median {median(errors.values()):.2e}, greatest {errors[worst]:.2e} ({worst})")
    print(f"{options.out}: LoRA of rank {ranks[-1]}, error {done.error:.2e} over all layers")
    if done.error > LARGE:
        print(
            f"the LoRA lacks much of the adapter's update, {done.error:.0%} of its norm: give a larger --rank, or none"
        )


if __name__ == "__main__":
    main()
