"""Step times of methods against the frozen floor, measured side by side.

One round times one forward and backward pass of every entry in turn, so that a machine whose speed drifts slows all of
them alike; a method's ratio is taken within each round. The floor is the frozen base with the gradient of its input: no
method that trains something inside the layers can do with less.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.records import SCHEMA, content_hash, write_atomically

Config = dict[str, Any]
FLOOR = "floor"


def measure_step_times(configs: Sequence[Config], folder: Path, rounds: int = 15, length: int = 64) -> Path:
    """Seconds per forward and backward pass of every method in `configs`, one file per set of methods and device.

    A file that is there is kept. Methods are told apart by their label; all configs must share one base model.
    """
    import torch
    from tqdm import trange

    from experiments import methods
    from experiments.environment import device_name
    from experiments.models import load_base, resolve_device

    by_label = {config["method"]["label"]: config for config in configs if config["method"]["trains"] != "nothing"}
    first = next(iter(by_label.values()))
    device = resolve_device(first["runtime"]["device"])
    batch = (first["recipe"]["micro_batch_size"], length)
    described = {
        "schema": SCHEMA,
        "model": first["model"]["name"],
        "device": device_name(str(device)),
        "batch": list(batch),
    }
    path = folder / f"step_times-{content_hash([described, sorted(by_label), rounds])[:16]}.json"
    if path.is_file():
        return path
    entries: dict[str, Any] = {FLOOR: load_base(first, str(device))[0].requires_grad_(False).train()}
    for label, config in by_label.items():
        entries[label] = methods.attach(config["method"], load_base(config, str(device))[0]).train()
    tokens = torch.randint(first["model"]["architecture"]["vocab_size"], batch, device=device)
    seconds: dict[str, list[float]] = {label: [] for label in entries}
    warmup = 3
    for number in trange(warmup + rounds, desc="step times, interleaved", unit="round", leave=False):
        for label, model in entries.items():
            took = _step(model, tokens, needs_input_gradient=label == FLOOR)
            if number >= warmup:
                seconds[label].append(took)
    write_atomically(path, json.dumps({**described, "seconds": seconds}) + "\n")
    return path


def _step(model: Any, tokens: Any, needs_input_gradient: bool) -> float:
    """One forward and backward pass. The optimizer's step is left out: its cost is the parameter count's."""
    import torch

    model.zero_grad()
    embeddings = model.get_input_embeddings()(tokens)
    if needs_input_gradient:
        embeddings = embeddings.detach().requires_grad_()
    _synchronize(tokens.device)
    started = time.perf_counter()
    model(inputs_embeds=embeddings, labels=tokens).loss.backward()
    _synchronize(tokens.device)
    took = time.perf_counter() - started
    if needs_input_gradient:
        assert isinstance(embeddings.grad, torch.Tensor)
    return took


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
