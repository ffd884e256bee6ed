# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Completions through lm-eval, from a fixed plan, in chunks that are either complete or absent.

A plan fixes the order of the rows (longest prompt first) and cuts it into chunks. Each chunk is generated with a random
state that depends only on the run and the chunk, and is written at once. So a stopped evaluation resumes with the next
chunk and gives the result of an uninterrupted one. lm-eval's own request cache cannot replace this: it skips sampled
requests and stores pickles.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eval.benchmarks import Benchmark, Row
from experiments.data.prompts import Asked, prompt_text, prompt_tokens
from experiments.errors import UserError
from experiments.runs.attempts import Heartbeat
from experiments.runs.follows import read_score
from experiments.runs.preemption import deferred
from experiments.runs.records import EvalPaths, TrainRecord, content_hash, read_json, read_lines, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = dict[str, Any]
BATCHES_PER_CHUNK = 4
KEPT = {"program": ("test", "entry_point"), "refusal": ("instruction",)}  # fields that scoring needs besides the answer


def make_plan(about: Config, prompts: Sequence[str], batch_size: int) -> Config:
    """Return `about` (run, benchmark, settings, hashes) with the order of the rows and the rows per chunk."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    samples = about["settings"]["asked"]["generation"]["samples"]
    chunk_rows = max(1, BATCHES_PER_CHUNK * batch_size // samples)
    return {**about, "batch_size": batch_size, "order": order, "chunk_rows": chunk_rows}


def begin(paths: EvalPaths, plan: Config) -> None:
    """Write the evaluation's plan, or check that the existing one is the same; a different one is an error."""
    if paths.plan.is_file() and paths.chunks.is_dir():
        found = read_json(paths.plan)
        for key in plan:
            if found.get(key) != plan[key]:
                raise UserError(
                    f"{paths.plan}: was started with another {key}: give that one, or delete the folder {paths.root} "
                    "to generate again"
                )
    else:
        write_atomically(paths.plan, json.dumps(plan) + "\n")


def check_weights(paths: EvalPaths, trained: TrainRecord) -> None:
    """Raise a UserError if the existing completions are of another adapter or base than the run's current one."""
    if paths.plan.is_file():
        plan = read_json(paths.plan)
        if (plan.get("adapter_files"), plan.get("base_hash")) != (trained.adapter_files, trained.base_hash):
            raise UserError(f"{paths.root}: made with other weights than {trained.run_id} has now: delete the folder")


def asked_of(plan: Config) -> Asked:
    """How the rows of a plan are asked."""
    asked = plan["settings"]["asked"]
    return Asked(plan["protocol"], asked["prompt"], asked["prompt_with_input"], asked["strip_prompt"])


def generate(
    plan: Config,
    benchmark: Benchmark,
    rows: Sequence[Row],
    lm: Any,
    tokenizer: PreTrainedTokenizerBase,
    about_model: Config,
    paths: EvalPaths,
    progress: bool,
    heartbeat: Heartbeat,
) -> None:
    """Write `samples.jsonl`: `samples` completions for every row of the plan, by `lm`, any lm-eval model.

    `about_model` goes into the first line: dtype, identity, number of cut prompts, environment.
    """
    from experiments.progress import Bar

    size, order = plan["chunk_rows"], plan["order"]
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    with Bar(total=len(order), desc=benchmark.name, unit="row", leave=False, disable=not progress) as bar:
        for number, indices in enumerate(chunks):
            path = paths.chunks / f"{number:05}.jsonl"
            heartbeat.at(number, len(chunks))
            if not path.is_file():
                with deferred():
                    started = time.perf_counter()
                    part: dict[int, Row] = {index: rows[index] for index in indices}
                    lines = _complete(plan, number, benchmark, part, lm, tokenizer)
                    header = {**about_model, "seconds": time.perf_counter() - started}
                    write_atomically(path, _json_lines([header, *lines]))
            bar.update(len(indices))
    _join(paths, [paths.chunks / f"{number:05}.jsonl" for number in range(len(chunks))])


def _complete(
    plan: Config,
    number: int,
    benchmark: Benchmark,
    rows: dict[int, Row],
    lm: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Config]:
    """Generate one chunk: a line for every row and sample, in the plan's order."""
    import torch

    asked = plan["settings"]["asked"]
    generation = asked["generation"]
    docs: list[Config] = []
    lines: list[Config] = []
    for index, row in rows.items():
        prompt = prompt_text(asked_of(plan), row)
        room = generation["max_new_tokens"]
        if generation["max_length"] is not None:
            (tokens,) = prompt_tokens(tokenizer, [prompt], asked["bos"])
            room = min(room, generation["max_length"] - len(tokens))
        line = {"prompt": prompt, "completion": "", "answer": row["answer"]}
        line |= {field: row[field] for field in KEPT.get(benchmark.kind, ())}
        for repeat in range(generation["samples"]):
            if room > 0:  # else the prompt leaves no room for a completion, which stays empty
                seed = int(content_hash([plan["run_id"], benchmark.name, number, index, repeat])[:8], 16)
                doc = {"line": len(lines), "prompt": prompt, "answer": row["answer"], "room": room, "seed": seed}
                docs.append(doc)
            lines.append({"index": index, "repeat": repeat, **line})
    seed = int(content_hash([plan["run_id"], benchmark.name, number])[:12], 16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for line, completion in _ask(benchmark, docs, lm, asked) if docs else ():
            lines[line]["completion"] = completion
    return lines


def request_settings(asked: Config) -> Config:
    """Return the settings of a benchmark's requests as lm-eval names them."""
    generation = asked["generation"]
    sampled = generation["samples"] > 1
    common = {"until": generation["stop"], "max_gen_toks": generation["max_new_tokens"], "do_sample": sampled}
    if sampled:  # set both: by default transformers keeps the 50 likeliest tokens and vLLM all
        top_p, top_k = generation["top_p"], generation["top_k"]
        common |= {
            "temperature": generation["temperature"],
            "top_p": 1.0 if top_p is None else top_p,
            "top_k": top_k or 0,
        }
    if generation["num_beams"] > 1:
        common["num_beams"] = generation["num_beams"]
    if asked["backend"] == "vllm":
        common["skip_special_tokens"] = True  # as transformers does
    return common


def _ask(benchmark: Benchmark, docs: list[Config], lm: Any, asked: Config) -> Iterator[tuple[int, str]]:
    """Yield (line number, completion) of every document, by lm-eval."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask

    seeded = asked["backend"] == "vllm" and asked["generation"]["samples"] > 1

    class Task(ConfigurableTask):
        def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> Any:
            """As lm-eval's, plus the settings that differ between rows."""
            request: Any = super().construct_requests(doc, ctx, **kwargs)
            request.arguments[1]["max_gen_toks"] = doc["room"]
            if seeded:  # vLLM seeds each request; transformers uses the chunk's random state
                request.arguments[1]["seed"] = doc["seed"]
            return request

    def dataset(**_: Any) -> dict[str, Any]:
        return {benchmark.split: datasets.Dataset.from_list(docs)}

    def text(doc: Config) -> str:
        return doc["prompt"]

    task = Task(
        config={
            **benchmark.task,
            "metric_list": [{"metric": "bypass", "higher_is_better": True}],  # we score ourselves
            "custom_dataset": dataset,
            "doc_to_text": text,
            "generation_kwargs": request_settings(asked),
        }
    )
    # `evaluate` instead of `simple_evaluate`, which first reads lm-eval's 13,000 task files.
    results: Any = evaluator.evaluate(lm=lm, task_dict={benchmark.name: task}, bootstrap_iters=0, log_samples=True)
    for sample in results["samples"][benchmark.name]:
        yield sample["doc"]["line"], sample["resps"][0][0]


def _join(paths: EvalPaths, chunks: list[Path]) -> None:
    """Join all chunks into one file, in the benchmark's order."""
    headers: list[Config] = []
    lines: list[Config] = []
    for path in chunks:
        header, *part = read_lines(path)
        headers.append(header)
        lines += part
    lines.sort(key=itemgetter("index", "repeat"))
    whole = headers[-1] | {"seconds": sum(header["seconds"] for header in headers)}
    write_atomically(paths.samples, _json_lines([whole, *lines]))
    shutil.rmtree(paths.chunks)


def reuse(paths: EvalPaths, plan: Config) -> bool:
    """Copy the completions of a finished evaluation with the same generation settings and model, if there is one."""
    same = plan.keys() - {"protocol", "protocol_version", "settings"}
    for other in sorted(paths.root.parent.glob("*/plan.json")):
        found, samples = read_json(other), other.with_name("samples.jsonl")
        asked_the_same = found["settings"]["asked"] == plan["settings"]["asked"]
        if samples.is_file() and asked_the_same and all(found[key] == plan[key] for key in same):
            if (source := EvalPaths(other.parent)).score.is_file():
                read_score(source)  # else changed completions of one evaluation would become another's
            write_atomically(paths.samples, samples.read_text(encoding="utf-8"))
            return True
    return False


def check_room(plan: Config, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int) -> int:
    """Return how many prompts do not fit completely into a model's `context` tokens.

    These lose their beginning to make room for the completion; if prompt and completion share `max_length` tokens and
    the prompt fills them, it is not completed at all.
    """
    asked = plan["settings"]["asked"]
    generation = asked["generation"]
    room = context - generation["max_new_tokens"]
    if room <= 0:
        raise UserError(
            f"evaluation.generation.max_new_tokens={generation['max_new_tokens']} leaves no room for a prompt in the "
            f"model's context of {context} tokens: reduce it"
        )
    if generation["max_length"] is not None:
        room = generation["max_length"] - 1
    return sum(len(tokens) > room for tokens in prompt_tokens(tokenizer, prompts, asked["bos"]))


def _json_lines(lines: Sequence[Config]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def quiet() -> None:
    """Silence lm-eval's log and its progress bars, for which it has no switch."""
    import logging

    import lm_eval.api.task
    from tqdm import tqdm

    for name in ("lm_eval", "lm_eval.api.task", "lm_eval.evaluator"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class NoBar(cast(Any, tqdm)):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})

    lm_eval.api.task.tqdm = NoBar  # pyright: ignore[reportAttributeAccessIssue]
