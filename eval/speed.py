# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Measures how fast back ends complete the test prompts of a trained run.

    python -m eval.speed runs/RUN --rows 64
    python -m eval.speed runs/RUN --rows 4 --samples 20 --vllm .venv-vllm/bin/python --out results/generation

Each round completes all rows once by every back end, in an order of its own: `hf` (eval/hf.py), `lm-eval` (its own
transformers model), `transformers` (a plain loop of `model.generate` over batches) and, with --vllm, vLLM in the Python
environment that has it. All get the same merged model and tokens. Times exclude loading. Writes `generation.json` and
prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from experiments import ROOT
from experiments.errors import UserError, run_command

Config = dict[str, Any]
Complete = Callable[[], list[str]]
HF = "hf"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a trained run directory")
    parser.add_argument("overrides", nargs="*", help="evaluation.key=value, as for eval.run")
    parser.add_argument("--rows", type=int, default=64, help="test rows (default: 64)")
    parser.add_argument("--samples", type=int, default=1, help="completions of each row; several are sampled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment with vLLM")
    parser.add_argument("--out", type=Path, default=Path("report") / "generation")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # a merged model: answer requests with vLLM
    options = parser.parse_intermixed_args(arguments)
    if options.serve is not None:
        serve(options.serve)
        return
    for name in ("rows", "samples", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give one or more")
    print(measure(options))


def measure(options: argparse.Namespace) -> str:
    """Measure all back ends, write the record and return it as a table."""
    from eval.backends import load
    from eval.generate import asked_of, quiet, request_settings
    from eval.hf import Transformers
    from eval.run import planned, rows_of, with_overrides
    from experiments.data.prompts import prompt_text
    from experiments.models.shapes import resolve_device
    from experiments.runs.config_files import read_config
    from experiments.runs.environment import environment
    from experiments.runs.evaluations import LIKELIHOOD
    from experiments.runs.records import SCHEMA, RunPaths, trained_record, write_atomically
    from experiments.speed.timing import interleaved

    run = RunPaths(options.run.resolve())
    several = ["evaluation.generation.temperature=0.8"] if options.samples > 1 else []
    count = f"evaluation.generation.samples={options.samples}"
    config = with_overrides(read_config(run), ["evaluation.merge=true", count, *several, *options.overrides])
    benchmark, settings = next(entry for entry in planned(config) if entry[0].kind != LIKELIHOOD)
    asked = settings["asked"]
    plan = {"protocol": config.evaluation.protocol, "settings": settings}
    rows = rows_of(config, benchmark)[: options.rows]
    prompts = [prompt_text(asked_of(plan), row) for row in rows for _ in range(options.samples)]
    kwargs = request_settings(asked)
    scored = load(config, run, trained_record(run), allow_identity=True)
    quiet()
    size, bos = config.evaluation.batch_size, config.evaluation.bos
    models: dict[str, Any] = {
        HF: Transformers(scored.model, scored.tokenizer, size, bos, scored.context),
        "lm-eval": _lm_eval(scored.model, scored.tokenizer, size, scored.context),
    }
    entries: dict[str, Complete] = {
        name: lambda model=model: model.generate_until(requests(prompts, kwargs), disable_tqdm=True)
        for name, model in models.items()
    }
    entries["transformers"] = lambda: plain(scored.model, scored.tokenizer, prompts, bos, size, kwargs)
    with ExitStack() as stack:
        if options.vllm is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=run.root, prefix=".merged-"))
            scored.model.save_pretrained(folder)
            scored.tokenizer.save_pretrained(folder)
            about = {"dtype": scored.dtype, "context": scored.context, "bos": bos}
            Path(folder, "about.json").write_text(json.dumps(about), encoding="utf-8")
            engine = stack.enter_context(Engine(options.vllm, folder))
            entries["vllm"] = lambda: engine.complete(prompts, {**kwargs, "skip_special_tokens": True})
        texts: dict[str, list[str]] = {}

        def keep(name: str) -> None:
            texts[name] = entries[name]()

        work = {name: lambda name=name: keep(name) for name in entries}
        device = str(resolve_device(config.runtime.device))
        seconds = interleaved(work, options.rounds, device, warmup=1, title=f"{len(prompts)} completions")
    tokens = {
        name: sum(map(len, scored.tokenizer(found, add_special_tokens=False)["input_ids"]))  # pyright: ignore
        for name, found in texts.items()
    }
    record = {
        "schema": SCHEMA,
        "run_id": config.run_id,
        "benchmark": benchmark.name,
        "rows": len(rows),
        "samples": options.samples,
        "batch_size": size,
        "dtype": scored.dtype,
        "generation": asked["generation"],
        "prompt_tokens": sum(map(len, scored.tokenizer(prompts)["input_ids"])),  # pyright: ignore
        "environment": environment(device),
        "entries": {
            name: {
                "seconds": seconds[name],
                "completion_tokens": tokens[name],
                "equal_to_hf": sum(a == b for a, b in zip(found, texts[HF], strict=True)),
            }
            for name, found in texts.items()
        },
    }
    write_atomically(options.out / "generation.json", json.dumps(record, indent=1) + "\n")
    return table(record)


def table(record: Config) -> str:
    """Return a record as text: seconds, tokens per second, and the time relative to hf's, round by round."""
    from tabulate import tabulate

    ours = record["entries"][HF]["seconds"]
    lines: list[list[Any]] = []
    for name, entry in record["entries"].items():
        ratios = sorted(theirs / mine for theirs, mine in zip(entry["seconds"], ours, strict=True))
        rate = entry["completion_tokens"] / median(entry["seconds"])
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        total = record["rows"] * record["samples"]
        lines.append(
            [name, f"{median(entry['seconds']):.1f}", f"{rate:.0f}", spread, f"{entry['equal_to_hf']}/{total}"]
        )
    headers = ["back end", "seconds", "tokens per second", "time ÷ hf's (range)", "equal to hf's"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def requests(prompts: Sequence[str], kwargs: Config) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, (prompt, dict(kwargs)), index) for index, prompt in enumerate(prompts)]


def _lm_eval(model: Any, tokenizer: Any, batch_size: int, context: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    kind: Any = HFLM
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)


def plain(model: Any, tokenizer: Any, prompts: Sequence[str], bos: bool, size: int, kwargs: Config) -> list[str]:
    """Complete batches of prompts, longest first, by `model.generate` with its own stop strings."""
    import torch

    from experiments.data.prompts import prompt_tokens

    rows = [torch.tensor(tokens, device=model.device) for tokens in prompt_tokens(tokenizer, prompts, bos)]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    settings = {name: value for name, value in kwargs.items() if name not in ("until", "max_gen_toks")}
    if kwargs["until"]:
        settings |= {"stop_strings": kwargs["until"], "tokenizer": tokenizer}
    texts = [""] * len(rows)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        inputs = [rows[index] for index in part]
        tokens, mask = (
            torch.nn.utils.rnn.pad_sequence(found, True, value, "left")
            for found, value in ((inputs, tokenizer.pad_token_id), ([torch.ones_like(row) for row in inputs], 0))
        )
        written = model.generate(tokens, attention_mask=mask, max_new_tokens=kwargs["max_gen_toks"], **settings)
        for index, text in zip(part, tokenizer.batch_decode(written[:, tokens.shape[1] :], True), strict=True):
            texts[index] = min((text.split(stop)[0] for stop in kwargs["until"] if stop), key=len, default=text)
    return texts


class Engine:
    """vLLM in another Python environment: a process that answers a line of prompts with a line of completions."""

    def __init__(self, python: Path, folder: str) -> None:
        self.command = [str(python), "-m", "eval.speed", folder, "--serve", folder]

    def __enter__(self) -> Engine:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        pipes: Config = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            self.process = subprocess.Popen(self.command, cwd=ROOT, encoding="utf-8", **pipes)
        except OSError as error:
            raise UserError(f"--vllm {self.command[0]}: {error.strerror}: give the interpreter of .venv-vllm") from None
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()
        self.errors.close()

    def complete(self, prompts: Sequence[str], kwargs: Config) -> list[str]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([list(prompts), kwargs]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            last = next((line for line in reversed(lines) if "rror: " in line), "it ended without an answer")
            raise UserError(f"--vllm {self.command[0]}: {last.removeprefix('error: ')}")
        return json.loads(line)


def serve(folder: Path) -> None:
    """Answer requests of an `Engine` on standard input, with vLLM on the model in `folder`."""
    import transformers

    from eval.backends import vllm
    from eval.generate import quiet

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    auto: Any = transformers.AutoTokenizer
    engine = vllm(str(folder), auto.from_pretrained(folder), about["dtype"], about["context"], about["bos"])
    quiet()
    print(json.dumps([]), file=answers, flush=True)
    for line in sys.stdin:
        prompts, kwargs = json.loads(line)
        found = engine.generate_until(requests(prompts, kwargs), disable_tqdm=True)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    run_command(main)
