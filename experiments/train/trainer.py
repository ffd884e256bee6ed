# pyright: reportUnknownMemberType=false
"""transformers' Trainer with additions: checkpoints without pickle, a data order that needs no replay, and the gradient
norm of every trained tensor at every step.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from diablo import refresh
from experiments.data.tokens import Examples
from experiments.errors import Diverged
from experiments.progress import Bar
from experiments.runs import preemption
from experiments.runs.attempts import Heartbeat
from experiments.runs.records import cut_lines
from experiments.train import checkpoint as checkpoints
from experiments.train import sharding
from experiments.train.loss import TargetForward
from experiments.train.methods import trained_tensors
from experiments.train.sampler import EpochSampler


class RunTrainer(Trainer):
    """Trains `model`; writes `metrics` (JSON lines, one per optimizer step) and checkpoints.

    `meta` are the hashes of everything that the training depends on: a checkpoint is only resumed if they match.
    """

    def __init__(
        self,
        *,
        metrics: Path,
        checkpoint_folder: Path,
        meta: dict[str, Any],
        batch_size: int,
        progress: str,
        heartbeat: Heartbeat,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        assert isinstance(self.model, torch.nn.Module)
        self.remove_callback(PrinterCallback)
        self.metrics, self.checkpoint_folder, self.meta = metrics, checkpoint_folder, meta
        self.batch_size = batch_size
        self.seconds_before = 0.0  # seconds of earlier attempts
        self.resumed_at: list[int] = []
        self.started = self.last_step_end = time.perf_counter()
        self.forward = TargetForward(self.model)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the number of targets in the whole batch
        self._norms: list[float] = []
        if self.is_fsdp_enabled:
            sharding.choose_precision(
                self.accelerator.state, in_bf16=self.args.bf16 and not isinstance(self.model, PeftModel)
            )
        self.add_callback(_BetweenSteps(heartbeat))
        if progress and self.args.process_index == 0:
            self.add_callback(_Progress(progress))

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Trained tensors by name, looked up each time because sharding replaces the model's parameters."""
        return trained_tensors(cast(torch.nn.Module, self.model))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            sharding.shard_on_cpu(self.accelerator.state, self.args)
            self.is_fsdp_enabled = True

    # Data order

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        assert isinstance(self.train_dataset, Examples)
        lengths = self.train_dataset.lengths
        steps = max(1, len(lengths) // self.batch_size)
        return EpochSampler(
            lengths,
            batch_size=self.batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            epoch=lambda: self.state.global_step // steps,
            group_by_length=self.args.train_sampling_strategy == "group_by_length",
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return an order by length; `score_rows` restores the original order."""
        return eval_dataset.lengths.argsort(kind="stable").tolist()

    # Loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute the loss of labelled positions, in chunks. `num_items_in_batch`: targets in all micro-batches."""
        assert not return_outputs
        targets = self.forward(model, inputs)
        count = len(targets.tokens) if num_items_in_batch is None else int(num_items_in_batch)
        with self.accelerator.autocast():
            loss = targets.loss(max(1, count))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss *= self.accelerator.num_processes  # because gradients are averaged over the processes
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._tr_loss = self._tr_loss.to(torch.promote_types(self._tr_loss.dtype, loss.dtype))  # Trainer's is float32
        return loss

    @torch.no_grad()
    def score_rows(self, examples: Examples) -> torch.Tensor:
        """Return `Targets.row_scores` of examples that are not trained on, in order, on the CPU."""
        model = cast(torch.nn.Module, self.model).eval()
        found: list[torch.Tensor] = []
        for batch in self.get_test_dataloader(cast(Any, examples)):
            with self.accelerator.autocast():
                scores = self.forward(model, cast(Any, self._prepare_inputs(batch))).row_scores()
            found.append(cast(torch.Tensor, self.accelerator.gather_for_metrics(scores)).cpu())
        sharding.release_gathered(model)
        scores = torch.cat(found)
        return scores[torch.tensor(self._get_eval_sampler(examples)).argsort()]

    # Metrics

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._norms = self._gradient_norms()
        return cast(Any, super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # clipping is off
            self._norms = self._gradient_norms()
        return cast(Any, super()._get_grad_norm(model, grad_norm))

    def _gradient_norms(self) -> list[float]:
        """Return Frobenius norms before clipping, in the order of `trained`, with one transfer from the device."""
        trained = self.trained
        gradients = [sharding.local(parameter.grad) for parameter in trained.values() if parameter.grad is not None]
        if len(gradients) != len(trained):
            without = [name for name, parameter in trained.items() if parameter.grad is None]
            raise RuntimeError(f"no gradient reached {len(without)} trained tensors, the first is {without[0]}")
        norms = cast(list[float], sharding.norms(gradients, across=self.is_fsdp_enabled).tolist())
        for name, norm in zip(trained, norms, strict=True):
            if not math.isfinite(norm):  # check before the optimizer corrupts the trained tensors and its state
                raise Diverged(self.state.global_step + 1, f"the gradient of {name} is not finite")
        return norms

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl is the history
        if "loss" not in logs or not self.args.should_save:
            return
        if not math.isfinite(logs["loss"]):
            raise Diverged(self.state.global_step, f"the loss is {logs['loss']}")
        now = time.perf_counter()
        record = {
            "step": self.state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "gradient_norm": logs["grad_norm"],
            "gradient_norms": self._norms,
            "seconds": round(now - self.last_step_end, 6),
        }
        self.last_step_end = now
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: Trainer would walk all modules at every step for a figure that is not used."""
        return 0

    # Checkpoints

    def resume(self) -> None:
        """Train from the newest complete checkpoint, or from the start if there is none.

        Raises:
            UserError: it was written by another number of processes, or with another sharding.
        """
        checkpoint = self._newest_checkpoint()
        if checkpoint is not None:
            checkpoints.check_layout(checkpoint, self._layout())
        if self.args.should_save:
            for unfinished in self.checkpoint_folder.glob(".step-*"):
                shutil.rmtree(unfinished)
            cut_lines(self.metrics, checkpoints.step_of(checkpoint) if checkpoint else 0)
        self.started = self.last_step_end = time.perf_counter()
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _newest_checkpoint(self) -> Path | None:
        """Find the checkpoint in the first process only, because checking it reads all of its files."""
        found = checkpoints.newest(self.checkpoint_folder, self.meta) if self.args.process_index == 0 else None
        if not torch.distributed.is_initialized():
            return found
        step = torch.tensor(checkpoints.step_of(found) if found else -1, device=self.args.device)
        torch.distributed.broadcast(step, 0)
        return checkpoints.folder(self.checkpoint_folder, int(step)) if step >= 0 else None

    def _layout(self) -> dict[str, Any]:
        return {"processes": self.args.world_size, "sharding": "full" if self.is_fsdp_enabled else "none"}

    def _tensor_file(self, folder: Path, name: str) -> Path:
        """Return the file of this process's part of the weights or the optimizer's state, or of the whole."""
        return folder / (
            f"{name}-{self.args.process_index}.safetensors" if self.is_fsdp_enabled else f"{name}.safetensors"
        )

    def train_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        final = checkpoints.folder(self.checkpoint_folder, self.state.global_step)
        aside = final.with_name(f".{final.name}")
        try:
            self._write_checkpoint(aside, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"{final}: cannot be written, the previous checkpoint is kept ({error})") from error

    def _write_checkpoint(self, aside: Path, final: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        tensors, rest = checkpoints.random_state()
        save_file(tensors, aside / f"random-{self.args.process_index}.safetensors")
        (aside / f"random-{self.args.process_index}.json").write_text(json.dumps(rest), encoding="utf-8")
        rest: dict[str, Any] = {}
        if self.args.should_save or self.is_fsdp_enabled:
            weights = {
                name: sharding.local(tensor.detach()).cpu().contiguous() for name, tensor in self.trained.items()
            }
            save_file(weights, self._tensor_file(aside, "weights"))
            tensors, rest = checkpoints.flatten_optimizer(cast(Any, self.optimizer).state_dict())
            save_file(tensors, self._tensor_file(aside, "optimizer"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            scheduler = cast(Any, self.lr_scheduler)
            progress = {
                "optimizer": rest,
                "scheduler": scheduler.state_dict(),
                "seconds": self.train_seconds(),
                "resumed_at": self.resumed_at,
            }
            (aside / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
            self.state.save_to_json(str(aside / "trainer_state.json"))
            checkpoints.publish(aside, final, {**self.meta, **self._layout()})
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(self._tensor_file(Path(resume_from_checkpoint), "weights"))
        with torch.no_grad():
            for name, parameter in self.trained.items():
                sharding.local(parameter).copy_(weights[name])
        refresh(cast(torch.nn.Module, self.model))  # writes in-place trained tensors into their weights

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        tensors = load_file(self._tensor_file(folder, "optimizer"))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict(checkpoints.unflatten_optimizer(tensors, progress["optimizer"], parameters))
        scheduler.load_state_dict(progress["scheduler"])
        self.seconds_before = progress["seconds"]
        self.resumed_at = [*progress["resumed_at"], checkpoints.step_of(folder)]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        name = Path(checkpoint) / f"random-{self.args.process_index}"
        rest = json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))
        checkpoints.restore_random_state(load_file(name.with_suffix(".safetensors")), rest)


class _BetweenSteps(TrainerCallback):
    """Updates the heartbeat, and after a signal stops an unfinished training with a checkpoint."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.heartbeat.at(state.global_step, state.max_steps, int(state.num_input_tokens_seen))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.heartbeat.at(state.global_step, state.max_steps, int(state.num_input_tokens_seen))
        if preemption.agreed(args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class _Progress(TrainerCallback):
    """One progress bar per run, removed when the run is done."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Bar | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = Bar(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", leave=False, mininterval=0.5
        )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.bar is not None
        self.bar.update()

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.bar is not None
        self.bar.close()
