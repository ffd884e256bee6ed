"""Measures speed and memory of tokenising commonsense rows, and the share of padding in batches.

    python -m experiments.speed.tokens --data-root data                     # prints a table
    python -m experiments.speed.tokens --data-root data --out tokens.json   # also writes the figures

The rows are those of the task commonsense_74k, repeated up to the size of commonsense_170k. The tokenizer is trained on
them; its size and kind are Llama-2's (byte-level BPE of 32,000 entries), its token counts are not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import Protocol
from experiments.errors import UserError, run_command
from experiments.runs.records import SCHEMA, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from experiments.data.rows import Row

TASK, PROTOCOLS = "commonsense_74k", ("diablo", "llm_adapters")
ROWS = 170_420  # of commonsense_170k
VOCABULARY = 32_000
BATCH, MICRO_BATCHES = 16, (4, 16)
TOKENIZER = f"byte-level BPE of {VOCABULARY:,} entries trained on these rows (not a Llama tokenizer)"


def measure(rows: list[Row], tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> dict[str, Any]:
    """Measure the first call of `tokenised` with an empty cache, the second call, and the padding of the result."""
    from experiments.data.tokens import tokenised

    with tempfile.TemporaryDirectory() as cache:
        with peak_memory() as peak:
            start = time.perf_counter()
            examples = tokenised(protocol, tokenizer, rows, Path(cache))
            seconds = time.perf_counter() - start
        start = time.perf_counter()
        examples = tokenised(protocol, tokenizer, rows, Path(cache))
        again = time.perf_counter() - start
        tokens = int(examples.lengths.sum())
        return {
            "rows": len(examples),
            "tokens": tokens,
            "truncated": examples.truncated,
            "seconds": seconds,
            "rows_per_second": len(examples) / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_extra_bytes": peak[0],
            "cached_seconds": again,
            "padding": {
                str(micro): {
                    name: padding(examples.lengths, micro, group_by_length=grouped)
                    for name, grouped in (("shuffled", False), ("grouped", True))
                }
                for micro in MICRO_BATCHES
            },
        }


def padding(lengths: np.ndarray, micro_batch_size: int, group_by_length: bool) -> float:
    """Return the share of padding in an epoch's tokens, with each micro-batch padded to its longest row."""
    from experiments.train.sampler import EpochSampler

    sampler = EpochSampler(
        lengths,
        batch_size=BATCH,
        micro_batch_size=micro_batch_size,
        seed=0,
        epoch=lambda: 0,
        group_by_length=group_by_length,
    )
    batches = lengths[list(sampler)].reshape(-1, micro_batch_size)
    return 1 - float(batches.sum() / (batches.max(axis=1).sum() * micro_batch_size))


@contextmanager
def peak_memory() -> Generator[list[int], None, None]:
    """Yield the peak resident bytes of the process beyond those at the start, sampled every 5 ms."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [0]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def trained_tokenizer(rows: list[Row]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{row['instruction']}\n{row['output']}" for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['rows']:,} rows, made from {figures['different_rows']:,}; {figures['cores']} cores",
        f"tokenizer: {figures['tokenizer']}",
        "",
        "| protocol | tokens/row | seconds | rows/s | tokens/s | extra MiB | cached, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, entry in figures["protocols"].items():
        lines.append(
            f"| {name} | {entry['tokens'] / entry['rows']:.1f} | {entry['seconds']:.1f} | "
            f"{entry['rows_per_second']:,.0f} | {entry['tokens_per_second']:,.0f} | "
            f"{entry['peak_extra_bytes'] / 2**20:.0f} | {entry['cached_seconds']:.2f} |"
        )
    lines += ["", "| protocol | micro-batch | padding, shuffled | padding, grouped |", "|---|---:|---:|---:|"]
    for name, entry in figures["protocols"].items():
        for micro, shares in entry["padding"].items():
            lines.append(f"| {name} | {micro} | {shares['shuffled']:.1%} | {shares['grouped']:.1%} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.tokens", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-root", default=os.environ.get("DIABLO_DATA_ROOT"), help="default: $DIABLO_DATA_ROOT")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"default: {ROWS:,}")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_intermixed_args(arguments)
    if options.rows < BATCH:
        raise UserError(f"--rows {options.rows}: give at least {BATCH}, one batch")
    import json

    from experiments.data.rows import load_rows
    from experiments.plan.compose import plan
    from experiments.runs.environment import environment

    configs = [plan([f"task={TASK}", f"protocol={protocol}", "recipe.learning_rate=0"])[0] for protocol in PROTOCOLS]
    different = load_rows(configs[0].task.data, "train", options.data_root)
    rows = list(itertools.islice(itertools.cycle(different), options.rows))
    tokenizer = trained_tokenizer(different)
    figures = {
        "schema": SCHEMA,
        "rows": len(rows),
        "different_rows": min(len(rows), len(different)),
        "tokenizer": TOKENIZER,
        "cores": os.cpu_count(),
        "protocols": {c.protocol.name: measure(rows, tokenizer, c.protocol) for c in configs},
        "environment": environment("cpu"),
    }
    print(table(figures))
    if options.out:
        write_atomically(options.out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
