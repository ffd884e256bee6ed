"""Trainer's settings for a run."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from experiments.config import RunConfig
from experiments.runs.records import RunPaths
from experiments.train.processes import accumulation_steps, join, world_size
from experiments.train.sharding import sharding_of, trainer_settings

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # ours -> transformers'


def training_arguments(config: RunConfig, run: RunPaths, device: torch.device) -> TrainingArguments:
    """Return Trainer's settings for a run. The batch size is the config's, however many processes share it."""
    recipe, runtime = config.recipe, config.runtime
    accumulation = accumulation_steps(recipe)
    join(device)  # before TrainingArguments, which starts torch's process group
    return TrainingArguments(
        output_dir=str(run.root),
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and world_size() > 1 else None,
        seed=config.seed,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps,
        optim=recipe.optimizer,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=config.model.dtype == "bfloat16",  # `auto` is already resolved by with_dtype
        gradient_checkpointing=runtime.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are frozen; a quantised base keeps all its weights in buffers
        ddp_timeout=6 * 3600,  # the other processes wait for the one that makes a quantised base
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be visible
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=runtime.checkpoint_every,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[] if runtime.wandb == "off" else ["wandb"],
        run_name=config.run_id,
        **(trainer_settings() if sharding_of(config) == "full" else {}),
    )
