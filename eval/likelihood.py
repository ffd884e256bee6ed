# pyright: reportUnknownMemberType=false
"""Likelihood benchmarks: how well a run's model predicts given targets, as negative log-likelihood (NLL) in nats.

Rows are tokenised exactly as in training (experiments/data/tokens.py), by the run's own protocol or the one that the
task file names, except that rows with equal prompts all count and that a prompt is never a target, also if the training
loss includes it; a plain text is cut into windows (eval/text.py). The model is the one that generates, in its dtype and
without autocast; the softmax is in float32, and at most as many logits are in memory as in training
(experiments/train/loss.py). `samples.jsonl` has a line for every row: `index`, `nll` (summed over its targets),
`targets` (their number) and `exact` (1 if every target is the argmax). There is no resuming: it takes seconds.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from eval.benchmarks import Row
from eval.text import Windows
from experiments.config import Protocol, RunConfig
from experiments.errors import UserError
from experiments.models.shapes import resolve_device
from experiments.runs.attempts import Heartbeat
from experiments.runs.environment import environment, free_memory
from experiments.runs.records import EvalPaths, write_atomically
from experiments.settings import section

if TYPE_CHECKING:
    import torch

    from eval.backends import Scored
    from experiments.data.tokens import Examples

Config = dict[str, Any]


def measure(
    about: Config,
    rows: list[Row],
    config: RunConfig,
    scored: Scored,
    paths: EvalPaths,
    progress: bool,
    heartbeat: Heartbeat,
) -> None:
    """Write `plan.json` and `samples.jsonl` of one likelihood benchmark. `about` is the plan without its order."""
    from experiments.data.tokens import tokenised

    size, name = config.evaluation.batch_size, about["benchmark"]
    plan = {**about, "batch_size": size, "order": list(range(len(rows)))}
    write_atomically(paths.plan, json.dumps(plan) + "\n")
    protocol = about["settings"]["asked"]["protocol"]
    if protocol["name"] == "text":
        examples = Windows(scored.tokenizer, rows)
    else:
        examples = tokenised(section(Protocol, protocol), scored.tokenizer, rows, Path(config.runtime.cache_dir))
    longest = int(examples.lengths.max())
    if longest > scored.context:
        raise UserError(
            f"{name}: a row has {longest:,} tokens, and the model takes {scored.context:,}: choose a benchmark whose "
            f"protocol has a smaller max_length"
        )
    if examples.unlabelled == len(examples):
        raise UserError(f"{name}: no row has a target: protocol {about['protocol']} cuts them all off")
    started = time.perf_counter()
    scores = score_examples(scored, examples, size, name if progress else "", heartbeat)
    header: Config = {
        "dtype": scored.dtype,
        "identity": scored.identity,
        "cut_prompts": examples.truncated,
        "environment": environment(str(resolve_device(config.runtime.device))),
        "seconds": time.perf_counter() - started,
    }
    lines: list[Config] = []
    for index, (nll, targets, exact) in enumerate(cast(list[list[float]], scores.tolist())):
        if not math.isfinite(nll):
            raise UserError(f"{name}: the NLL of row {index} is {nll} in {scored.dtype}: a larger model.dtype may help")
        lines.append({"index": index, "nll": float(f"{nll:.7g}"), "targets": int(targets), "exact": int(exact)})
    write_atomically(paths.samples, "".join(json.dumps(line) + "\n" for line in [header, *lines]))


def score_examples(
    scored: Scored, examples: Examples | Windows, batch_size: int, title: str = "", heartbeat: Heartbeat | None = None
) -> torch.Tensor:
    """Return `Targets.row_scores` of all examples, in order, on the CPU. Rows of similar length share a batch.

    A batch that does not fit into memory is halved, and so are the later ones.
    """
    import torch

    from experiments.data.prompts import collate
    from experiments.progress import Bar
    from experiments.train.loss import TargetForward

    model: Any = scored.model
    order = torch.from_numpy(examples.lengths.argsort(kind="stable")[::-1].copy())  # largest memory need first
    found: list[torch.Tensor] = []
    with torch.no_grad(), Bar(total=len(order), desc=title, unit="row", leave=False, disable=not title) as bar:
        forward = TargetForward(model)
        done = 0
        while done < len(order):
            if heartbeat is not None:
                heartbeat.at(done, len(order))
            rows = cast(list[int], order[done : done + batch_size].tolist())
            batch = collate([examples[row] for row in rows], cast(int, scored.tokenizer.pad_token_id))
            inputs: Any = {name: tensor.to(model.device) for name, tensor in batch.items()} | {"use_cache": False}
            try:
                found.append(forward(model, inputs).row_scores())
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                batch_size = len(rows) // 2
                free_memory()
                continue
            done += len(rows)
            bar.update(len(rows))
        return torch.cat(found).cpu()[order.argsort()]  # one transfer from the device


def score_likelihood(lines: list[Config]) -> tuple[list[float], dict[str, float], dict[str, int], float]:
    """Return items, `extra_metrics`, counts and standard error of `score.json` from the lines of `samples.jsonl`.

    An item is a row's NLL divided by the mean number of targets per row, so that the mean over items is the NLL per
    target token and runs can be compared row by row. The standard error is that of a ratio of two means over rows: it
    uses the rows' deviations from the ratio, since a longer row has a larger NLL anyway.
    """
    targets = sum(line["targets"] for line in lines)
    mean, n = targets / len(lines), len(lines)
    per_token = sum(line["nll"] for line in lines) / targets
    squares = math.fsum((line["nll"] - per_token * line["targets"]) ** 2 for line in lines)
    error = math.sqrt(squares / (n - 1) / n) / mean if n > 1 else 0.0
    extra_metrics = {"exact": fmean(line["exact"] and line["targets"] > 0 for line in lines), "targets": float(targets)}
    without = sum(line["targets"] == 0 for line in lines)
    return [line["nll"] / mean for line in lines], extra_metrics, {"unparsed": without, "fallback": 0}, error
