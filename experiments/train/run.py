"""The training of one run: base model, data, adapter, Trainer, record.

The run directory's config decides everything. A finished run is left as it is; an interrupted one goes on from its last
checkpoint, on the CPU bit for bit as if it had never stopped.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.errors import Diverged, Preempted, UserError
from experiments.runs import preemption
from experiments.runs.attempts import Heartbeat, attempt
from experiments.runs.records import (
    RunPaths,
    TrainRecord,
    config_hash,
    content_hash,
    file_hash,
    read_config,
    read_json,
    read_lines,
    read_record,
    write_atomically,
    write_record,
)
from experiments.train.processes import accumulation_steps, join, wait_for_everyone, world_size

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

Config = dict[str, Any]
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # ours -> transformers'


def train(run: RunPaths, progress: str = "", beside_living: bool = False) -> TrainRecord:
    """Train the run, or read its record if it is finished. The run that its method needs first is trained before.

    Args:
        progress: the title of the progress bar, if any.
        beside_living: wait for another process that is training the run, instead of failing.
    """
    from experiments.runs.prerequisite import first_run

    config = read_config(run)
    if run.train_record.is_file():
        run.preempted.unlink(missing_ok=True)
        return read_record(run.train_record, TrainRecord)
    _check_not_diverged(run)
    first = first_run(run, config)
    if first is not None:  # several runs share it; processes that train together cannot wait for one of others
        train(first, progress and first.root.name, beside_living=world_size() == 1)
        gc.collect()  # Trainer and its model refer to each other
    with attempt(run, "train", beside_living) as heartbeat:
        if run.train_record.is_file():  # by the process whose lock was waited for
            return read_record(run.train_record, TrainRecord)
        _check_not_diverged(run)
        try:
            return _train(run, config, first, progress, heartbeat)
        except Diverged as error:
            write_atomically(run.diverged, json.dumps({"step": error.step, "reason": error.reason}) + "\n")
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            raise


def _check_not_diverged(run: RunPaths) -> None:
    """A training that diverged once would do so again: it is not repeated in silence."""
    if run.diverged.is_file():
        about = read_json(run.diverged)
        raise UserError(f"{Diverged(about['step'], about['reason'])}, or delete {run.diverged} to train it again")


def _train(run: RunPaths, config: Config, first: RunPaths | None, progress: str, heartbeat: Heartbeat) -> TrainRecord:
    from transformers import set_seed

    from experiments.data.prompts import collate, select_rows
    from experiments.data.rows import rows_hash, training_rows
    from experiments.data.tokens import tokenised
    from experiments.models.full_precision import base_name
    from experiments.models.load import base_hash, load_base
    from experiments.models.shapes import count_parameters, resolve_device, weights_hash, with_dtype
    from experiments.runs.environment import environment, peak_memory, reset_peak_memory
    from experiments.runs.prerequisite import check_base
    from experiments.train import methods
    from experiments.train.held_out import measure
    from experiments.train.preparation import Backward, row_steps
    from experiments.train.sharding import gather, sharding_of
    from experiments.train.spectra import MeasureSpectra
    from experiments.train.trainer import RunTrainer

    device = resolve_device(config["runtime"]["device"])
    run_hash, config = config_hash(config), with_dtype(config, str(device))
    sharded = sharding_of(config) == "full"
    reset_peak_memory(str(device))
    arguments = training_arguments(config, run, device)
    trains = config["method"]["trains"] != "nothing"
    with arguments.main_process_first(local=False):  # one process makes or downloads what the others then find
        source = (config["task"]["data"], config["runtime"]["data_root"])
        rows, others = training_rows(*source) if trains else ([], [])
        base, tokenizer = load_base(config, "cpu" if sharded else str(arguments.device))
    base_parameters, about_base = count_parameters(base), base_name(config, base)
    hashes: Any = {
        "config_hash": run_hash,
        "base_hash": base_hash(base),
        "data_hash": rows_hash(rows),
    }
    if first is not None:
        check_base(run, first, hashes["base_hash"])
    steps, tokens, seconds, truncated, kept, tensors, resumed_at, held_out = 0, 0, 0.0, 0, 0, [], [], None
    unlabelled = 0
    examples, unseen, backward = None, None, None
    padded = partial(collate, pad_token_id=cast(int, tokenizer.pad_token_id))
    if trains:
        with arguments.main_process_first(local=False):
            cache = Path(config["runtime"]["cache_dir"])
            examples = tokenised(config["protocol"], tokenizer, select_rows(config["protocol"], rows), cache)
            unseen = tokenised(config["protocol"], tokenizer, others, cache)
        _check_batches(config, len(examples))
        unlabelled = examples.unlabelled
        _check_labels(config, unlabelled, len(examples))
        truncated, kept = examples.truncated, len(examples)
        if config["method"].get("prepare"):
            cast(Any, base).to(arguments.device)
            steps_of_rows = row_steps(examples, config, padded, arguments.device)
            backward = Backward(base, steps_of_rows, arguments.world_size if sharded else 1)
    set_seed(config["seed"])
    shards = arguments.world_size if sharded else 1
    model: Any = methods.attach(config["method"], base, backward, first and first.adapter, shards)
    del backward
    if sharded:
        model.to("cpu")  # whence it goes to the devices part by part
    if arguments.gradient_checkpointing:
        methods.check_checkpointing(config["method"], model)
    initial = methods.initial_state(model)
    start = weights_hash(methods.trained_tensors(model))
    chosen = weights_hash({**initial, **methods.prepared_tensors(model)})
    if examples is not None:
        trainer = RunTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=padded,
            metrics=run.metrics,
            checkpoint_folder=run.checkpoints,
            meta={**hashes, "start_hash": content_hash([start, chosen])},
            batch_size=config["recipe"]["batch_size"],
            progress=progress,
            heartbeat=heartbeat,
        )
        if "spectra" in config and arguments.should_save:
            trainer.add_callback(MeasureSpectra(model, run.spectra, config["spectra"]))
        preemption.raise_at_once(False)  # from here on the steps look, and what follows the last one is short
        if preemption.agreed(arguments.device):
            raise Preempted
        with _wandb(config, run, arguments.should_save):
            trainer.resume()
        if trainer.state.global_step < trainer.state.max_steps:
            wait_for_everyone()
            raise Preempted
        steps, tokens = trainer.state.global_step, int(trainer.state.num_input_tokens_seen)
        seconds, tensors, resumed_at = trainer.train_seconds(), list(trainer.trained), trainer.resumed_at
        held_out = measure(trainer, unseen, run.held_out) if unseen else None
        if held_out is not None and held_out["loss"] is None:
            raise Diverged(steps, "the loss on the held-out rows is not finite")
        trainer.accelerator.free_memory()
    if sharded:
        gather(model)
    if not arguments.should_save:  # the other processes of a distributed run wait for the record
        wait_for_everyone()
        return read_record(run.train_record, TrainRecord)
    _save(config, model, run, initial)
    lines = list(read_lines(run.metrics)) if steps else []
    record = TrainRecord(
        run_id=config["run_id"],
        **hashes,
        adapter_files={path.name: file_hash(path) for path in sorted(run.adapter.iterdir())},
        trainable_parameters=sum(tensor.numel() for tensor in methods.trained_tensors(model).values()),
        base_parameters=base_parameters,
        steps=steps,
        rows=len(rows),
        examples=kept,
        tokens=tokens,
        truncated=truncated,
        changed=weights_hash(methods.trained_tensors(model)) != start,
        final_loss=statistics.fmean(line["loss"] for line in lines[-max(1, steps // 10) :]) if lines else None,
        held_out=held_out,
        train_seconds=seconds,
        step_seconds=statistics.median(line["seconds"] for line in lines) if lines else None,
        peak_memory_bytes=peak_memory(str(arguments.device)),
        resumed_at=resumed_at,
        tensors=tensors,
        forward_modes=methods.forward_modes(model),
        world_size=arguments.world_size,
        sharding=sharding_of(config),
        environment=environment(str(arguments.device)),
        base=about_base,
        dtype=config["model"]["dtype"],
        unlabelled=unlabelled,
    )
    write_record(run.train_record, record)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    wait_for_everyone()
    return record


def training_arguments(config: Config, run: RunPaths, device: torch.device) -> TrainingArguments:
    """Trainer's settings for a run. The batch is the config's, however many processes share it."""
    from transformers import TrainingArguments

    from experiments.train.sharding import sharding_of, trainer_settings

    recipe, runtime = config["recipe"], config["runtime"]
    accumulation = accumulation_steps(recipe)
    join(device)  # before TrainingArguments, which starts torch's group of them
    return TrainingArguments(
        output_dir=str(run.root),
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and world_size() > 1 else None,
        seed=config["seed"],
        num_train_epochs=recipe["epochs"],
        max_steps=recipe["max_steps"] or -1,
        per_device_train_batch_size=recipe["micro_batch_size"],
        per_device_eval_batch_size=recipe["micro_batch_size"],
        train_sampling_strategy="group_by_length" if recipe["group_by_length"] else "random",
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe["learning_rate"],
        lr_scheduler_type=SCHEDULES[recipe["schedule"]],
        warmup_steps=recipe["warmup_steps"],
        optim=recipe["optimizer"],
        adam_beta1=recipe["betas"][0],
        adam_beta2=recipe["betas"][1],
        weight_decay=recipe["weight_decay"],
        max_grad_norm=recipe["max_grad_norm"],
        bf16=config["model"]["dtype"] == "bfloat16",  # `auto` is settled: experiments.models.with_dtype
        gradient_checkpointing=runtime["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are frozen; a quantised base has all its weights in them
        ddp_timeout=6 * 3600,  # processes wait for the one that makes a quantised base
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=runtime["checkpoint_every"],
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[] if runtime["wandb"] == "off" else ["wandb"],
        run_name=config["run_id"],
        **(trainer_settings() if sharding_of(config) == "full" else {}),
    )


@contextmanager
def _wandb(config: Config, run: RunPaths, main_process: bool) -> Iterator[None]:
    """One wandb run per run id, resumed when the training is; Trainer's callback finds it and logs into it."""
    if config["runtime"]["wandb"] == "off" or not main_process:
        yield
        return
    import wandb

    with wandb.init(
        project="diablo",
        id=config["run_id"],
        resume="allow",
        mode=config["runtime"]["wandb"],
        dir=run.root,
        config=config,
    ):
        yield


def _check_batches(config: Config, rows: int) -> None:
    if rows < config["recipe"]["batch_size"]:
        raise UserError(f"{rows} training rows do not fill one batch of {config['recipe']['batch_size']}")


def _check_labels(config: Config, unlabelled: int, rows: int) -> None:
    """Rows whose every label was cut off teach nothing: said before training, and refused where none is left."""
    if not unlabelled:
        return
    lengths = ", ".join(
        f"protocol.{key}={config['protocol'][key]}"
        for key in ("max_length", "max_prompt_length", "max_target_length")
        if config["protocol"][key] is not None
    )
    told = f"{unlabelled:,} of {rows:,} training rows have no label: what the loss would see is cut off by {lengths}"
    if unlabelled == rows:
        raise UserError(f"{told}: give more")
    if os.environ.get("RANK", "0") == "0":
        print(f"{config['run_id']}: {told}", file=sys.stderr, flush=True)


def _save(config: Config, model: Any, run: RunPaths, initial: Any) -> None:
    """Write what was trained aside and rename it, so that a folder named `adapter` is whole."""
    from experiments.train import methods

    aside = run.root / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    methods.save(config["method"], model, aside, initial)
    shutil.rmtree(run.adapter, ignore_errors=True)
    os.rename(aside, run.adapter)
