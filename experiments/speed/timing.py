"""Interleaved time measurements, and the step times of a run's methods relative to the frozen floor.

A round times every entry once, so that drifts of the machine's speed affect all entries alike; ratios are taken
within each round. The floor is the frozen base with the gradient of its input: the minimum for any method that trains
something inside the layers.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from experiments.config import RunConfig
from experiments.models.load import load_base
from experiments.models.shapes import empty_base, resolve_device
from experiments.runs.environment import device_name
from experiments.runs.prerequisite import prerequisite_config
from experiments.runs.records import content_hash, write_atomically
from experiments.train import methods
from experiments.train.preparation import Backward

FLOOR = "floor"
LARGEST = 10_000_000  # parameters of a base: the floor and all methods' models are in memory together, for 18 rounds
STEP_TIMES_SCHEMA = 1


def can_measure(configs: Sequence[RunConfig]) -> bool:
    """Return whether `measure_step_times` supports these runs: one small model and one task, so that each label stands
    for one method. For larger models, train.json has the step time, and experiments.speed.layers measures passes."""
    one = len({(config.model.name, config.task.name) for config in configs}) == 1
    trained = any(config.method.trains != "nothing" for config in configs)
    return one and trained and empty_base(configs[0].model.architecture).num_parameters() <= LARGEST


def measure_step_times(configs: Sequence[RunConfig], folder: Path, rounds: int = 15, length: int = 64) -> Path:
    """Measure seconds per forward and backward pass of every method in `configs`; one file per methods and device.

    An existing file is kept. Methods are identified by their label; all configs must share one base model and task.
    """
    by_label = {config.method.label: config for config in configs if config.method.trains != "nothing"}
    first = next(iter(by_label.values()))
    device = resolve_device(first.runtime.device)
    batch = (first.recipe.micro_batch_size, length)
    described = {
        "schema": STEP_TIMES_SCHEMA,
        "model": first.model.name,
        "device": device_name(str(device)),
        "batch": list(batch),
    }
    methods_measured = {label: config.mapping["method"] for label, config in by_label.items()}
    path = folder / f"step_times-{content_hash([described, methods_measured, rounds])[:16]}.json"
    if path.is_file():
        return path
    tokens = torch.randint(first.model.architecture["vocab_size"], batch, device=device)
    entries: dict[str, Any] = {FLOOR: load_base(first, str(device))[0].requires_grad_(False).train()}
    for label, config in by_label.items():
        entries[label] = _attached(config, tokens).train()
    passes = {label: partial(forward_backward, model, tokens) for label, model in entries.items()}
    seconds = interleaved(passes, rounds, str(device))
    write_atomically(path, json.dumps({**described, "seconds": seconds}) + "\n")
    return path


def _attached(config: RunConfig, tokens: Any) -> Any:
    """Return a run's method on its base, prepared with random tokens and, if it needs one, a one-step first adapter.

    The prepared choice is not a real run's, but has the same size.
    """
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    before = prerequisite_config(config)
    with tempfile.TemporaryDirectory() as folder:
        if before is not None:
            model = _attached(before, tokens)
            initial = methods.initial_state(model)
            forward_backward(model, tokens)
            torch.optim.SGD(methods.trained_tensors(model).values(), lr=1e-3).step()  # pyright: ignore[reportUnknownMemberType]
            methods.save(before.method, model, Path(folder), initial)
        base = load_base(config, str(tokens.device))[0]
        backward = Backward(base, itertools.repeat([batch]))
        return methods.attach(config.method, base, backward, Path(folder) if before else None)


def interleaved(
    entries: Mapping[str, Callable[[], object]], rounds: int, device: str, warmup: int = 3, title: str = "step times"
) -> dict[str, list[float]]:
    """Return the seconds of every entry in every round; each round has its own order, drawn with a fixed seed.

    With a fixed order, an entry that always followed full fine-tuning, which leaves caches and allocator in another
    state, took 5 % longer.

    Warm-up rounds are not counted. An entry's work is finished, also on a GPU, before the next one starts.
    """
    labels, order = list(entries), random.Random(0)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for number in trange(warmup + rounds, desc=f"{title}, interleaved", unit="round", leave=False):
        for label in order.sample(labels, len(labels)):
            synchronize(device)
            started = time.perf_counter()
            entries[label]()
            synchronize(device)
            if number >= warmup:
                seconds[label].append(time.perf_counter() - started)
    return seconds


def forward_backward(model: Any, tokens: Any) -> None:
    """Run a forward and backward pass over `tokens`, `(rows, length)`, including the gradient of the embeddings.

    Uses bf16 autocast if the model is bf16, as in training: PEFT's own methods keep their factors in float32.
    """
    model.zero_grad()
    embeddings = model.get_input_embeddings()(tokens)
    if not embeddings.requires_grad:
        embeddings = embeddings.detach().requires_grad_()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=embeddings.dtype == torch.bfloat16):
        loss = model(inputs_embeds=embeddings, labels=tokens).loss
    loss.backward()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
