# pyright: reportUnknownMemberType=false
"""Trains one run: start (base model and rows), attach (adapter), fit (Trainer), save, record.

The run directory's config determines everything. A finished run is left alone; an interrupted one resumes from its last
checkpoint, on the CPU bit-equal to an uninterrupted run.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from experiments.config import RunConfig
from experiments.data.prompts import collate, select_rows
from experiments.data.rows import rows_hash, training_rows
from experiments.data.tokens import Examples, tokenised
from experiments.errors import Diverged, Preempted, UserError, check_installed
from experiments.models.full_precision import base_name
from experiments.models.load import base_hash, load_base
from experiments.models.shapes import count_parameters, resolve_device, weights_hash, with_dtype
from experiments.runs import preemption
from experiments.runs.attempts import Heartbeat, attempt
from experiments.runs.config_files import config_hash, read_config
from experiments.runs.environment import environment, peak_memory, reset_peak_memory
from experiments.runs.prerequisite import check_base, prerequisite_run
from experiments.runs.records import (
    CARD,
    RunPaths,
    TrainRecord,
    content_hash,
    file_hash,
    read_json,
    read_lines,
    read_record,
    write_atomically,
    write_record,
)
from experiments.train import methods
from experiments.train.arguments import training_arguments
from experiments.train.card import write_card
from experiments.train.held_out import measure
from experiments.train.preparation import Backward, row_steps
from experiments.train.processes import wait_for_everyone, world_size
from experiments.train.sharding import gather, sharding_of
from experiments.train.spectra import MeasureSpectra
from experiments.train.trainer import RunTrainer


@dataclass(frozen=True)
class Start:
    """The start of a training. `examples` are the tokenised training rows; None if nothing is trained."""

    config: RunConfig
    arguments: TrainingArguments
    base: PreTrainedModel
    pad_token_id: int
    hashes: dict[str, str]  # of config, base and data, as in the record
    base_parameters: int
    base_name: str
    rows: int
    examples: Examples | None
    held_out: Examples | None

    @property
    def shards(self) -> int:
        """Number of processes that each hold a part of the model; 1 if each holds all of it."""
        return cast(int, self.arguments.world_size) if sharding_of(self.config) == "full" else 1

    @property
    def collate(self) -> Any:
        return partial(collate, pad_token_id=self.pad_token_id)


@dataclass(frozen=True)
class Attached:
    """The model with what is trained. `initial`: what saving needs from its first state; `hash`: id of that state."""

    model: Any
    initial: dict[str, Tensor]
    hash: str
    trained_hash: str  # of the trained tensors only


@dataclass(frozen=True)
class Fitted:
    """Results of the training loop; the defaults are those of a run that trains nothing."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tensors: list[str] = field(default_factory=list[str])
    resumed_at: list[int] = field(default_factory=list[int])
    held_out: dict[str, Any] | None = None


def train(run: RunPaths, progress: str = "", wait_for_holder: bool = False) -> TrainRecord:
    """Train the run and its prerequisite run, if any, or read its record if it is finished.

    Args:
        progress: the title of the progress bar, if any.
        wait_for_holder: wait for another process that is training the run, instead of failing.
    """
    config = read_config(run)
    if run.train_record.is_file():
        run.preempted.unlink(missing_ok=True)
        return read_record(run.train_record, TrainRecord)
    _check_not_diverged(run)
    prerequisite = prerequisite_run(run, config)
    if prerequisite is not None:
        # Several runs may share it; distributed processes cannot wait for other processes' run.
        train(prerequisite, progress and prerequisite.root.name, wait_for_holder=world_size() == 1)
        gc.collect()  # Trainer and its model refer to each other
    with attempt(run, "train", wait_for_holder) as heartbeat:
        if run.train_record.is_file():  # written by the process whose lock was waited for
            return read_record(run.train_record, TrainRecord)
        _check_not_diverged(run)
        try:
            return _train(run, config, prerequisite, progress, heartbeat)
        except Diverged as error:
            write_atomically(run.diverged, json.dumps({"step": error.step, "reason": error.reason}) + "\n")
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            raise


def _check_not_diverged(run: RunPaths) -> None:
    """Raise a UserError if the training diverged before: it would again, so it is not silently repeated."""
    if run.diverged.is_file():
        about = read_json(run.diverged)
        raise UserError(f"{Diverged(about['step'], about['reason'])}, or delete {run.diverged} to train it again")


def _train(
    run: RunPaths, config: RunConfig, prerequisite: RunPaths | None, progress: str, heartbeat: Heartbeat
) -> TrainRecord:
    start = _start(run, config)
    if prerequisite is not None:
        check_base(run, prerequisite, start.hashes["base_hash"])
    attached = _attach(start, prerequisite)
    fitted = _fit(run, start, start.examples, attached, progress, heartbeat) if start.examples else Fitted()
    if start.shards > 1:
        gather(attached.model)
    if start.arguments.should_save:  # other processes of a distributed run wait for the record
        _save(run, start, attached)
        write_record(run.train_record, _record(run, start, attached, fitted))
        write_card(run)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    wait_for_everyone()
    return read_record(run.train_record, TrainRecord)


def _start(run: RunPaths, config: RunConfig) -> Start:
    """Load the base model and the training rows."""
    if config.runtime.wandb != "off":
        check_installed("wandb", f"runtime.wandb={config.runtime.wandb}")
    device = resolve_device(config.runtime.device)
    run_hash, config = config_hash(config.mapping), with_dtype(config, str(device))
    sharded = sharding_of(config) == "full"
    reset_peak_memory(str(device))
    arguments = training_arguments(config, run, device)
    trains = config.method.trains != "nothing"
    with arguments.main_process_first(local=False):  # one process makes or downloads what the others then use
        data, data_root = config.task.data, config.runtime.data_root
        rows, held_out = training_rows(data, data_root) if trains else ([], [])
        base, tokenizer = load_base(config, "cpu" if sharded else str(arguments.device))
    examples, held_out_examples = None, None
    if trains:
        with arguments.main_process_first(local=False):
            cache = Path(config.runtime.cache_dir)
            examples = tokenised(config.protocol, tokenizer, select_rows(config.protocol, rows), cache)
            held_out_examples = tokenised(config.protocol, tokenizer, held_out, cache)
        _check_examples(config, examples)
    return Start(
        config=config,
        arguments=arguments,
        base=base,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        hashes={"config_hash": run_hash, "base_hash": base_hash(base), "data_hash": rows_hash(rows)},
        base_parameters=count_parameters(base),
        base_name=base_name(config, base),
        rows=len(rows),
        examples=examples,
        held_out=held_out_examples,
    )


def _check_examples(config: RunConfig, examples: Examples) -> None:
    """Raise a UserError for fewer rows than a batch, and report rows whose labels were all cut off before training."""
    rows, unlabelled = len(examples), examples.unlabelled
    if rows < config.recipe.batch_size:
        raise UserError(f"{rows} training rows do not fill one batch of {config.recipe.batch_size}")
    if not unlabelled:
        return
    lengths = ", ".join(
        f"protocol.{key}={value}"
        for key in ("max_length", "max_prompt_length", "max_target_length")
        if (value := getattr(config.protocol, key)) is not None
    )
    told = f"{unlabelled:,} of {rows:,} training rows have no label: their targets are cut off by {lengths}"
    if unlabelled == rows:
        raise UserError(f"{told}: increase it")
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.run_id}: {told}", file=sys.stderr, flush=True)


def _attach(start: Start, prerequisite: RunPaths | None) -> Attached:
    """Attach what the run's method trains; some methods first use gradients of training rows."""
    config, arguments, backward = start.config, start.arguments, None
    if start.examples and config.method.prepare:
        cast(Any, start.base).to(arguments.device)
        steps = row_steps(start.examples, config, start.collate, arguments.device)
        backward = Backward(start.base, steps, start.shards)
    set_seed(config.seed)
    model: Any = methods.attach(
        config.method, start.base, backward, prerequisite and prerequisite.adapter, start.shards
    )
    if start.shards > 1:
        model.to("cpu")  # from there, its parts go to the devices
    if arguments.gradient_checkpointing:
        methods.check_checkpointing(config.method, model)
    initial = methods.initial_state(model)
    trained_hash = weights_hash(methods.trained_tensors(model))
    chosen = weights_hash({**initial, **methods.prepared_tensors(model)})
    return Attached(model, initial, content_hash([trained_hash, chosen]), trained_hash)


def _fit(
    run: RunPaths, start: Start, examples: Examples, attached: Attached, progress: str, heartbeat: Heartbeat
) -> Fitted:
    """Train from the newest checkpoint, or from the start, to the end; then score the held-out rows.

    Raises:
        Preempted: a signal stopped the training; a checkpoint was written.
        Diverged: a loss or gradient is not finite.
    """
    config, arguments = start.config, start.arguments
    trainer = RunTrainer(
        model=attached.model,
        args=arguments,
        train_dataset=examples,
        data_collator=start.collate,
        metrics=run.metrics,
        checkpoint_folder=run.checkpoints,
        meta={**start.hashes, "start_hash": attached.hash},
        batch_size=config.recipe.batch_size,
        progress=progress,
        heartbeat=heartbeat,
    )
    if config.spectra is not None and arguments.should_save:
        trainer.add_callback(MeasureSpectra(attached.model, run.spectra, config.spectra))
    preemption.raise_immediately(False)  # from here on, steps check for signals, and what follows the last is short
    if preemption.agreed(arguments.device):
        raise Preempted
    with _wandb(config, run, cast(bool, arguments.should_save)):
        trainer.resume()
    if trainer.state.global_step < trainer.state.max_steps:
        wait_for_everyone()
        raise Preempted
    seconds = trainer.train_seconds()
    held_out = measure(trainer, start.held_out, run.held_out) if start.held_out else None
    if held_out is not None and held_out["loss"] is None:
        raise Diverged(trainer.state.global_step, "the loss on the held-out rows is not finite")
    fitted = Fitted(
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        tensors=list(trainer.trained),
        resumed_at=trainer.resumed_at,
        held_out=held_out,
    )
    trainer.accelerator.free_memory()
    return fitted


@contextmanager
def _wandb(config: RunConfig, run: RunPaths, main_process: bool) -> Generator[None, None, None]:
    """Open one wandb run per run id, resumed with the training; Trainer's callback logs into it."""
    if config.runtime.wandb == "off" or not main_process:
        yield
        return
    import wandb

    with wandb.init(
        project="diablo",
        id=config.run_id,
        resume="allow",
        mode=config.runtime.wandb,
        dir=run.root,
        config=dict(config.mapping),
    ):
        yield


def _save(run: RunPaths, start: Start, attached: Attached) -> None:
    """Write what was trained under a temporary name and rename it, so that a folder named `adapter` is complete."""
    aside = run.root / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    methods.save(start.config.method, attached.model, aside, attached.initial)
    shutil.rmtree(run.adapter, ignore_errors=True)
    os.rename(aside, run.adapter)


def _record(run: RunPaths, start: Start, attached: Attached, fitted: Fitted) -> TrainRecord:
    lines = list(read_lines(run.metrics)) if fitted.steps else []
    last = lines[-max(1, fitted.steps // 10) :]
    trained = methods.trained_tensors(attached.model)
    device = str(start.arguments.device)
    return TrainRecord(
        run_id=start.config.run_id,
        config_hash=start.hashes["config_hash"],
        base_hash=start.hashes["base_hash"],
        data_hash=start.hashes["data_hash"],
        adapter_files={path.name: file_hash(path) for path in sorted(run.adapter.iterdir()) if path.name != CARD},
        trainable_parameters=sum(tensor.numel() for tensor in trained.values()),
        base_parameters=start.base_parameters,
        steps=fitted.steps,
        rows=start.rows,
        examples=len(start.examples or ()),
        tokens=fitted.tokens,
        truncated=start.examples.truncated if start.examples else 0,
        changed=weights_hash(trained) != attached.trained_hash,
        final_loss=statistics.fmean(line["loss"] for line in last) if lines else None,
        held_out=fitted.held_out,
        train_seconds=fitted.seconds,
        step_seconds=statistics.median(line["seconds"] for line in lines) if lines else None,
        peak_memory_bytes=peak_memory(device),
        resumed_at=fitted.resumed_at,
        tensors=fitted.tensors,
        forward_modes=methods.forward_modes(attached.model),
        world_size=cast(int, start.arguments.world_size),
        sharding=sharding_of(start.config),
        environment=environment(device),
        base=start.base_name,
        dtype=start.config.model.dtype,
        unlabelled=start.examples.unlabelled if start.examples else 0,
    )
