"""Run directories: the path of each file, the fields of records, and how files are written. Standard library only.

A run is a directory named by its run id. `config.yaml` comes first; training adds `adapter/`, `metrics.jsonl` and
`train.json`; evaluation adds `eval/<benchmark>/<protocol>-<8 hex>/` with `plan.json`, `samples.jsonl` and `score.json`.
A stage is finished when its record (`train.json`, `score.json`) is there, and the record is always written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.errors import UserError
from experiments.rules import Value
from experiments.runs.received import check_file_names, has_type

SCHEMA = 5  # raised when a record changes its meaning
RENAMED = {4: {"beside": "extra_metrics", "no_match": "unparsed"}}  # fields of earlier schemas that are read still
CARD = "README.md"  # the model card, the one file of an adapter that may change after training
NLL = "nll"  # the metric of likelihood benchmarks


@dataclass(frozen=True)
class RunPaths:
    """The files of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def adapter(self) -> Path:
        """PEFT's files; for full fine-tuning the model's own."""
        return self.root / "adapter"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def spectra(self) -> Path:
        """Only in runs that measure spectra: experiments/train/spectra.py."""
        return self.root / "spectra.jsonl"

    @property
    def train_record(self) -> Path:
        return self.root / "train.json"

    @property
    def diverged(self) -> Path:
        """Exists if training did not stay finite: `step` and `reason`. Such a run has no train record."""
        return self.root / "diverged.json"

    @property
    def held_out(self) -> Path:
        """The scores of the rows kept out of training: experiments/train/held_out.py."""
        return self.root / "held_out.json"

    @property
    def learning_rate(self) -> Path:
        """How the run's learning rate was chosen, if an experiment chose it (experiments/plan/choose.py)."""
        return self.root / "learning_rate.json"

    @property
    def checkpoints(self) -> Path:
        """Exists only while training is unfinished."""
        return self.root / "checkpoints"

    @property
    def lock(self) -> Path:
        """The process that writes here now; experiments/runs/attempts.py describes this and the next three."""
        return self.root / "lock"

    @property
    def heartbeat(self) -> Path:
        return self.root / "heartbeat.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.json"

    @property
    def preempted(self) -> Path:
        return self.root / "preempted.json"

    def evaluation(self, benchmark: str, protocol: str, settings: dict[str, Any]) -> EvalPaths:
        """Return the folder of one evaluation: other settings, another folder."""
        return EvalPaths(self.root / "eval" / benchmark / f"{protocol}-{content_hash(settings)[:8]}")

    def evaluations(self) -> list[EvalPaths]:
        """Return all evaluations that were started, by name."""
        return [EvalPaths(path.parent) for path in sorted(self.root.glob("eval/*/*/plan.json"))]


@dataclass(frozen=True)
class EvalPaths:
    """The files of one evaluation."""

    root: Path

    @property
    def plan(self) -> Path:
        """The prompts, their order and how completions are read: written first and frozen."""
        return self.root / "plan.json"

    @property
    def chunks(self) -> Path:
        """The parts of an unfinished generation."""
        return self.root / "chunks"

    @property
    def samples(self) -> Path:
        """A first line about the generation, then every completion."""
        return self.root / "samples.jsonl"

    @property
    def judgements(self) -> Path:
        """The judge's answer for every completion, in protocols with a judge."""
        return self.root / "judgements.jsonl"

    @property
    def score(self) -> Path:
        return self.root / "score.json"


@dataclass(frozen=True)
class TrainRecord:
    """`train.json`: what was trained, on what, and what it took."""

    run_id: str
    config_hash: str
    base_hash: str  # sha256 of the base model's weights before the adapter was attached; of a quantised base its own
    data_hash: str  # sha256 of the training rows
    adapter_files: dict[str, str]  # file name -> sha256
    trainable_parameters: int
    base_parameters: int
    steps: int
    rows: int  # training rows in the data set
    examples: int  # of these, the rows that the protocol trains on
    tokens: int  # tokens trained on, prompts included and padding not
    truncated: int  # rows cut to the protocol's max_length
    changed: bool  # whether any trained tensor is not what it was at the start
    final_loss: float | None  # mean over the last tenth of the steps; None when nothing was trained
    held_out: dict[str, Any] | None  # of the rows kept out of training: `rows`, `loss` and `exact_match`; None without
    train_seconds: float  # wall time inside the training loop, all attempts together
    step_seconds: float | None  # median time of one optimizer step
    peak_memory_bytes: int  # device memory on CUDA, resident memory of the process elsewhere
    resumed_at: list[int]  # the step at which each resumed attempt began
    tensors: list[str]  # names of the trained tensors, in the order of `gradient_norms` in metrics.jsonl
    forward_modes: dict[str, str]  # layer -> how it was computed with, of methods that have more than one way
    world_size: int
    environment: dict[str, Any]
    base: str | None = None  # which weights: a hub id and commit, a GGUF file and its hash, or a folder
    dtype: str | None = None  # of the base's weights; with float32 weights also what autocast computes in
    unlabelled: int = 0  # examples without any token that the loss sees, cut off by max_length
    sharding: str = "none"  # full: every process held a part of each parameter, gradient and optimizer state
    schema: int = SCHEMA


@dataclass(frozen=True)
class EvalRecord:
    """`score.json`: one benchmark's score and how it was made."""

    run_id: str
    benchmark: str
    benchmark_version: float
    protocol: str
    protocol_version: int
    searched: str  # which text was read: the completion, or the prompt too
    parser: str  # how an answer was read from it
    equality: str  # when it was right
    judge: dict[str, Any] | None  # the chat model that read the completions, of protocols that have one
    metric: str  # what `accuracy` is: accuracy, pass@1, safety rate (share of safe answers), refusal rate or nll
    n: int  # rows scored
    samples: int  # completions per row
    accuracy: float  # mean of `items`; of likelihood benchmarks the NLL per target token: no share, lower is better
    standard_error: float  # of `accuracy`, over rows
    extra_metrics: dict[str, float]  # other figures of the same completions
    unparsed: int  # completions in which the parser found no answer; they count as wrong
    fallback: int  # completions read by the parser's second rule
    dropped: int  # rows that the protocol or `limit` leaves out
    cut_prompts: int  # prompts that lost their beginning because prompt and completion do not fit the model's context
    # 1 or 0 for every row, in the benchmark's order; with several samples the share that is right; of likelihood
    # benchmarks the row's NLL over the mean number of targets of a row
    items: list[float]
    generation: dict[str, Any]
    backend: str
    dtype: str
    batch_size: int
    seconds: float  # of generation
    identity: bool  # the adapter changed nothing on a probe: what was scored is the base
    base_hash: str
    adapter_files: dict[str, str]
    data_hash: str
    samples_hash: str  # sha256 of samples.jsonl
    environment: dict[str, Any]  # where the completions were made
    judgements_hash: str | None = None  # sha256 of judgements.jsonl, of protocols that have a judge
    schema: int = SCHEMA

    def shown(self, value: float, digits: int = 1) -> str:
        """Format a score or its error in the metric's unit: percent with so many digits, or nats."""
        return f"{value:.4f}" if self.metric == NLL else f"{value:.{digits}%}"


Record = TypeVar("Record", TrainRecord, EvalRecord)


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a record from its file, under today's field names. Other files and unknown schemas are refused."""
    data = read_json(path)
    for schema, renamed in RENAMED.items():
        if data.get("schema") == schema:
            data = {renamed.get(name, name): value for name, value in data.items()}
            data["schema"] = SCHEMA
    if data.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {data.get('schema')}, this version reads {SCHEMA}: delete it and run again")
    fields = dataclasses.fields(kind)
    names = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}  # the others came later
    if not needed <= set(data) <= names:
        raise UserError(
            f"{path}: fields {sorted((needed - set(data)) | (set(data) - names))} do not fit {kind.__name__}"
        )
    for field in fields:
        if field.name in data and not has_type(data[field.name], str(field.type)):
            raise UserError(f"{path}: {field.name} is no {field.type}: delete it and run the stage again")
    check_file_names(path, data["adapter_files"])
    return kind(**data)


def write_record(path: Path, record: TrainRecord | EvalRecord) -> None:
    write_atomically(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def trained_record(run: RunPaths) -> TrainRecord:
    """Return the run's train record after checking that the adapter is what training wrote."""
    if not run.train_record.is_file():
        raise UserError(f"{run.root}: not trained yet: run `python -m experiments.train {run.root}` first")
    record = read_record(run.train_record, TrainRecord)
    for name, digest in record.adapter_files.items():
        if name == CARD:  # in records of older versions
            continue
        path = run.adapter / name
        if not path.is_file() or file_hash(path) != digest:
            raise UserError(
                f"{path}: {'not what training wrote' if path.is_file() else 'missing'}: restore it, or delete "
                f"{run.train_record} and train again"
            )
    return record


def read_json(path: Path) -> dict[str, Any]:
    try:
        data: Value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): delete it and run the stage again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a record is a JSON object, this is a {type(data).__name__}")
    return data


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, without an incomplete last line (an interrupted write)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(content, dict):
                raise UserError(f"{path}, line {number}: a JSON object is needed, it holds {content!r:.40}")
            yield content


def cut_lines(path: Path, step: int) -> None:
    """Keep the lines up to a `step`: later ones belong to a lost attempt."""
    lines = list(read_lines(path)) if path.is_file() else []
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file, flush it and rename it: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(value: Any) -> str:
    """Return the sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
