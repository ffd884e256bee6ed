"""Score a trained run on its benchmarks.

    python -m eval.run runs/<run_id>
    python -m eval.run runs/<run_id> evaluation.benchmarks=[arith_heldout] evaluation.generation.num_beams=4

lm-eval generates; every completion is kept in `samples.jsonl`, and the score is a pure function of that file. Other
generation settings make another folder; what is finished is left as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eval.scoring import score
from experiments.errors import UserError, nearest, run_command
from experiments.prompts import prompt_text
from experiments.records import (
    EvalPaths,
    EvalRecord,
    RunPaths,
    TrainRecord,
    file_hash,
    read_config,
    read_lines,
    read_record,
    write_atomically,
    write_record,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Config = dict[str, Any]
TASKS = Path(__file__).resolve().parent / "tasks"
BACKEND = "hf"


def evaluate(run: RunPaths, overrides: list[str] | None = None, progress: bool = False) -> list[EvalRecord]:
    """Score the run on every benchmark of its config (or of `overrides`), generating only what is not there yet."""
    config = _with_overrides(read_config(run), overrides or [])
    trained = _trained(run)
    benchmarks = {name: read_benchmark(name) for name in config["evaluation"]["benchmarks"]}
    if not benchmarks:
        raise UserError(
            f"{run.root.name}: task {config['task']['name']} has no benchmark yet: name some with "
            f"evaluation.benchmarks=[…]"
        )
    model = None
    records = []
    for name, benchmark in benchmarks.items():
        paths = run.evaluation(name, config["protocol"]["name"], generation_settings(config))
        if not (paths.samples.is_file() and paths.score.is_file()):
            rows = _rows(config, benchmark)
            if not paths.samples.is_file():
                model = model or _load(config, run, trained)
                _generate(config, benchmark, rows, *model, paths, progress)
            if not paths.score.is_file():
                _score(config, benchmark, rows, trained, paths)
        records.append(read_record(paths.score, EvalRecord))
    return records


def generation_settings(config: Config) -> Config:
    """What decides the completions: they are stored under the hash of this."""
    evaluation = config["evaluation"]
    return {
        "generation": evaluation["generation"],
        "limit": evaluation["limit"],
        "merge": evaluation["merge"],
        "backend": BACKEND,
        "protocol_version": config["protocol"]["version"],
    }


def read_benchmark(name: str) -> Config:
    """A benchmark's lm-eval task file."""
    path = TASKS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no benchmark {name!r}: {nearest(name, (file.stem for file in TASKS.glob('*.yaml')))}")
    return yaml.safe_load(path.read_text())


def _trained(run: RunPaths) -> TrainRecord:
    """The run's train record, once its adapter is what training wrote."""
    if not run.train_record.is_file():
        raise UserError(f"{run.root}: not trained yet: run `python -m experiments.train {run.root}` first")
    record = read_record(run.train_record, TrainRecord)
    for name, digest in record.adapter_files.items():
        path = run.adapter / name
        if not path.is_file() or file_hash(path) != digest:
            raise UserError(
                f"{path}: {'not what training wrote' if path.is_file() else 'missing'}: restore it, or delete "
                f"{run.train_record} and train again"
            )
    return record


def _load(config: Config, run: RunPaths, trained: TrainRecord) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with what was trained on it. Refused: another base, and an adapter that changes nothing."""
    import torch

    from experiments import methods
    from experiments.models import load_base, resolve_device, weights_hash

    base, tokenizer = load_base(config, str(resolve_device(config["runtime"]["device"])))
    found = weights_hash(base.state_dict())
    if found != trained.base_hash:
        raise UserError(
            f"{run.root.name} was trained on a base model with hash {trained.base_hash[:12]}, the one at hand has "
            f"{found[:12]}: give the same weights (model.path, model.revision) or train again"
        )
    probe = torch.arange(16, device=base.device).unsqueeze(0) % base.config.vocab_size
    with torch.no_grad():
        before = base(input_ids=probe).logits
        model = methods.load(config["method"], base, run.adapter, merge=config["evaluation"]["merge"]).eval()
        unchanged = torch.equal(before, model(input_ids=probe).logits)
    if unchanged and trained.steps:
        raise UserError(
            f"{run.root.name}: after loading {run.adapter} the model still computes what its base does, so there is "
            f"nothing to score: the adapter was not applied, or {trained.steps} steps changed nothing"
        )
    return model, tokenizer


def _generate(
    config: Config,
    benchmark: Config,
    rows: list[dict[str, str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: EvalPaths,
    progress: bool,
) -> None:
    """Completions of every row through lm-eval, written at once."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    evaluation, protocol = config["evaluation"], config["protocol"]
    generation = dict(evaluation["generation"])
    started = time.perf_counter()
    with _quiet(progress):
        task = ConfigurableTask(
            config={
                **benchmark,
                "metric_list": [{"metric": "bypass", "higher_is_better": True}],  # the score is ours
                "custom_dataset": lambda **_: {benchmark["test_split"]: datasets.Dataset.from_list(rows)},
                "doc_to_text": lambda row: prompt_text(protocol, row),
                "generation_kwargs": {
                    "until": generation.pop("stop"),
                    "max_gen_toks": generation.pop("max_new_tokens"),
                    "do_sample": False,
                    **generation,
                },
            }
        )
        # PEFT's wrapper is not a PreTrainedModel, the model inside it is and carries the adapter's layers.
        causal = getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model
        harness: Any = HFLM  # lm-eval's registry hides the class's signature
        # `evaluate`, not `simple_evaluate`: that reads the 13,000 task files of lm-eval first, which takes longer than
        # the generation here.
        results: Any = evaluator.evaluate(
            lm=harness(
                pretrained=causal,
                tokenizer=tokenizer,
                batch_size=evaluation["batch_size"],
                add_bos_token=protocol["bos"],
            ),
            task_dict={benchmark["task"]: task},
            limit=evaluation["limit"],
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = sorted(results["samples"][benchmark["task"]], key=lambda sample: sample["doc_id"])
    lines = [
        {
            "index": sample["doc_id"],
            "prompt": sample["arguments"][0][0],
            "completion": sample["resps"][0][0],
            "answer": sample["target"],
        }
        for sample in samples
    ]
    header = {"seconds": time.perf_counter() - started, "dtype": str(model.dtype).removeprefix("torch.")}
    write_atomically(paths.samples, "".join(json.dumps(line) + "\n" for line in [header, *lines]))


def _score(
    config: Config, benchmark: Config, rows: list[dict[str, str]], trained: TrainRecord, paths: EvalPaths
) -> None:
    """`score.json` from `samples.jsonl`."""
    from experiments.data import rows_hash
    from experiments.environment import environment
    from experiments.models import resolve_device

    header, *samples = read_lines(paths.samples)
    evaluation = config["evaluation"]
    scored = score(
        evaluation["parser"], [sample["completion"] for sample in samples], [sample["answer"] for sample in samples]
    )
    record = EvalRecord(
        run_id=config["run_id"],
        benchmark=benchmark["task"],
        benchmark_version=benchmark["metadata"]["version"],
        protocol=config["protocol"]["name"],
        protocol_version=config["protocol"]["version"],
        parser=evaluation["parser"],
        n=len(samples),
        correct=sum(scored.items),
        accuracy=scored.accuracy,
        standard_error=scored.standard_error,
        no_match=scored.no_match,
        fallback=scored.fallback,
        dropped=0,
        items=scored.items,
        generation=generation_settings(config),
        backend=BACKEND,
        dtype=header["dtype"],
        batch_size=evaluation["batch_size"],
        seconds=header["seconds"],
        base_hash=trained.base_hash,
        adapter_files=trained.adapter_files,
        data_hash=rows_hash(rows),
        environment=environment(str(resolve_device(config["runtime"]["device"]))),
    )
    write_record(paths.score, record)


def _rows(config: Config, benchmark: Config) -> list[dict[str, str]]:
    """A benchmark's rows: made as the run's own task makes them, if it is the same data."""
    from experiments.data import load_rows

    own, source = config["task"]["data"], benchmark["metadata"]["source"]
    data = own if own["source"] == source else {"source": source}
    return load_rows(data, benchmark["test_split"], config["runtime"]["data_root"])


def _with_overrides(config: Config, overrides: list[str]) -> Config:
    """A frozen config with other evaluation or runtime settings, the only ones that may change after training."""
    from experiments.plan import set_values

    for override in overrides:
        if not override.startswith(("evaluation.", "runtime.")):
            raise UserError(f"{override}: a run's config is frozen, only evaluation.… and runtime.… may change")
    return set_values(config, overrides)


class _quiet:
    """Silences lm-eval's log, and its progress bars where the caller shows one: it has no switch for either."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress

    def __enter__(self) -> None:
        import logging
        from functools import partial

        import lm_eval.api.task
        import lm_eval.models.huggingface
        from tqdm import tqdm

        for name in ("lm_eval", "lm_eval.api.task", "lm_eval.evaluator", "lm_eval.models.huggingface"):
            logging.getLogger(name).setLevel(logging.ERROR)
        lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # pyright: ignore[reportAttributeAccessIssue]
        lm_eval.models.huggingface.tqdm = partial(  # pyright: ignore[reportAttributeAccessIssue]
            tqdm, disable=not self.progress, leave=False
        )

    def __exit__(self, *_: object) -> None:
        return


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a trained run directory")
    parser.add_argument("overrides", nargs="*", help="evaluation.key=value or runtime.key=value")
    options = parser.parse_intermixed_args(arguments)
    for record in evaluate(RunPaths(options.run.resolve()), options.overrides, progress=True):
        print(
            f"{record.benchmark} ({record.protocol}, {record.parser}): {record.accuracy:.1%} ± "
            f"{record.standard_error:.1%} ({record.correct} of {record.n}; {record.no_match} without an answer)"
        )


if __name__ == "__main__":
    run_command(main)
