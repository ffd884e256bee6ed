# pyright: reportUnknownMemberType=false
"""The cases of `experiments.speed.layers`: single layers, whole models, and N against rank at equal budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from experiments import CONFIGS
from experiments.errors import UserError
from experiments.models.shapes import build_config, resolve_device
from experiments.runs.environment import environment
from experiments.runs.records import SCHEMA, write_atomically
from experiments.speed import cases
from experiments.speed.cases import ADAPTER, AUTHORS, FLOOR, FULL, IN_PLACE, LABELS, LORA, OTHER_PATTERNS, RECOMPUTED
from experiments.speed.report import write_report
from experiments.speed.timing import forward_backward, interleaved

SUITES = ("layers", "models", "curve")
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024), (4096, 14336))
TARGETS = {
    "q k v up down": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "all seven": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LLAMA_100M = {  # for the CPU: 110 M parameters
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}
BLOCKS = {"llama_100m": 32, "llama2_7b": 64, "llama3_8b": 64}
CURVE = (16, 32, 64, 128, 256)


def measure_layer(
    options: Any, labels: tuple[str, ...], m: int, n: int, tokens: int, num_blocks: int
) -> dict[str, Any]:
    """Measure one linear layer m → n: forward pass, dX, and the gradients of trained tensors."""
    base = nn.Sequential(nn.Linear(m, n, bias=False, device=options.device, dtype=options.dtype))
    x = torch.randn(tokens, m, device=options.device, dtype=options.dtype, requires_grad=True)
    upstream = torch.randn(tokens, n, device=options.device, dtype=options.dtype)
    rank = cases.matched_rank([(m, n)], num_blocks)
    work: dict[str, Callable[[], None]] = {}
    parameters: dict[str, int] = {}
    layers: dict[str, nn.Module] = {}
    for label in labels:
        layer = cases.attach(label, cases.sharing(base), ["0"], num_blocks, rank, options.authors_repo).train()
        parameters[label] = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        layers[label] = layer
        work[label] = partial(_layer_pass, layer, x, upstream)
    seconds = interleaved(work, options.rounds, options.device, title=f"{m}×{n}, N={num_blocks}")
    costs = {label: cases.layer_cost(label, tokens, m, n, num_blocks, rank, options.element) for label in labels}
    return {
        "shape": [m, n],
        "tokens": tokens,
        "num_blocks": num_blocks,
        "rank": rank,
        "entries": {
            label: {
                "parameters": parameters[label],
                "seconds": seconds[label],
                "operations": costs[label].operations,
                "bytes": costs[label].bytes,
                "peak_bytes": cases.peak_bytes(work[label], [x, *layers[label].parameters()], options.device),
            }
            for label in labels
        },
    }


def _layer_pass(layer: Any, x: Any, upstream: Any) -> None:
    x.grad = None
    layer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    y.backward(upstream)


def measure_model(
    options: Any, labels: tuple[str, ...], name: str, targets: str, tokens: int, checkpointing: bool
) -> dict[str, Any]:
    """Measure a whole model: forward and backward pass, and separately the whole step with AdamW and its hooks."""
    length = min(options.length, tokens)
    with torch.device(options.device):
        base = cast(Any, AutoModelForCausalLM.from_config(build_config(architecture(name)), dtype=options.dtype))
        ids = torch.randint(base.config.vocab_size, (tokens // length, length))
    base.config.use_cache = False
    linears: dict[str, torch.nn.Linear] = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    shapes = [(m.in_features, m.out_features) for n, m in linears.items() if n.rpartition(".")[2] in TARGETS[targets]]
    num_blocks = options.num_blocks or BLOCKS.get(name, 64)
    rank = cases.matched_rank(shapes, num_blocks)
    passes: dict[str, Callable[[], None]] = {}
    steps: dict[str, Callable[[], None]] = {}
    trained: dict[str, list[torch.nn.Parameter]] = {}
    costs: dict[str, cases.Cost] = {}
    for label in labels:
        model = cases.attach(
            label, cases.sharing(base), TARGETS[targets], num_blocks, rank, options.authors_repo
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained[label] = [p for p in model.parameters() if p.requires_grad]
        passes[label] = partial(forward_backward, model, ids)
        # The rate is tiny so that the weights, which are shared, do not diverge.
        optimizer = torch.optim.AdamW(trained[label], lr=1e-7, fused=True) if trained[label] else None
        steps[label] = partial(_step, passes[label], optimizer)
        costs[label] = cases.Cost(0, 0)
        for layer, m in linears.items():
            own = layer.rpartition(".")[2] in TARGETS[targets] or label == cases.FULL
            costs[label] += cases.layer_cost(
                label if own else cases.FLOOR, tokens, m.in_features, m.out_features, num_blocks, rank, options.element
            )
    title = f"{name}, {targets}, {tokens} tokens" + (", checkpointing" if checkpointing else "")
    both = {**{f"pass {label}": work for label, work in passes.items()}, **{f"step {k}": w for k, w in steps.items()}}
    seconds = interleaved(both, options.rounds, options.device, warmup=2, title=title)
    return {
        "model": name,
        "targets": targets,
        "tokens": tokens,
        "length": length,
        "checkpointing": checkpointing,
        "num_blocks": num_blocks,
        "rank": rank,
        "base_parameters": base.num_parameters(),
        "entries": {
            label: {
                "parameters": sum(p.numel() for p in trained[label]),
                "seconds": seconds[f"pass {label}"],
                "step_seconds": seconds[f"step {label}"],
                "operations": costs[label].operations,
                "bytes": costs[label].bytes,
                "peak_bytes": cases.peak_bytes(passes[label], trained[label], options.device),
            }
            for label in labels
        },
    }


def _step(passes: Any, optimizer: Any) -> None:
    passes()
    if optimizer is not None:
        optimizer.step()


def architecture(name: str) -> dict[str, Any]:
    """Return the `model.architecture` of a file in configs/model, or of the CPU's model."""
    if name == "llama_100m":
        return dict(LLAMA_100M)
    path = CONFIGS / "model" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--models {name}: no file {path.name} in configs/model: give one of them, or llama_100m")
    return yaml.safe_load(path.read_text(encoding="utf-8"))["architecture"]


def machine_rates(options: Any) -> dict[str, float]:
    """Return operations per second of a large product, and bytes per second (read plus written) of a copy."""
    side = 8192 if options.device.startswith("cuda") else 2048
    a = torch.randn(side, side, device=options.device, dtype=options.dtype)
    b, source = torch.empty_like(a), torch.randn(2**26, device=options.device)
    target = torch.empty_like(source)
    seconds = interleaved(
        {"product": lambda: torch.mm(a, a, out=b), "copy": lambda: target.copy_(source)},
        max(options.rounds, 10), options.device, title="this machine",
    )  # fmt: skip
    return {
        "operations_per_second": 2 * side**3 / min(seconds["product"]),
        "bytes_per_second": 2 * source.nbytes / min(seconds["copy"]),
    }


def run(options: Any) -> Path:
    """Run all requested suites; returns the path of the table."""
    options.device = str(resolve_device(options.device))
    cuda = options.device.startswith("cuda")
    options.dtype = torch.bfloat16 if cuda else torch.float32
    options.element = options.dtype.itemsize
    options.tokens = options.tokens or ([4096, 8192, 16384] if cuda else [512])
    models = options.models or (["llama2_7b", "llama3_8b"] if cuda else ["llama_100m"])
    torch.manual_seed(0)
    labels = (FLOOR, FULL, IN_PLACE, *OTHER_PATTERNS) if options.patterns else LABELS
    labels = labels if options.authors_repo is None else (*labels, AUTHORS)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "dtype": str(options.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "environment": environment(options.device),
        "rates": {},
        **{suite: [] for suite in SUITES},
    }
    if "layers" in options.suites:
        for tokens in options.tokens:
            for m, n in options.shapes or SHAPES:
                result["layers"].append(measure_layer(options, labels, m, n, tokens, options.num_blocks or 64))
    if "curve" in options.suites:
        few = tuple(label for label in labels if label in (FLOOR, LORA, ADAPTER, IN_PLACE, AUTHORS))
        m, n = (options.shapes or SHAPES)[0]
        for num_blocks in (k for k in CURVE if m % k == 0 and n % k == 0):
            result["curve"].append(measure_layer(options, few, m, n, options.tokens[0], num_blocks))
    if "models" in options.suites:
        for name in models:
            for targets in TARGETS if cuda else ["q k v up down"]:
                for tokens in options.tokens if cuda else [max(options.tokens)]:
                    for checkpointing in (False, True) if cuda else (False,):
                        # Under checkpointing the layers' inputs are kept as usual.
                        some = labels if checkpointing or options.patterns else (*labels, RECOMPUTED)
                        result["models"].append(measure_model(options, some, name, targets, tokens, checkpointing))
                        if cuda:
                            torch.cuda.empty_cache()
    result["rates"] = machine_rates(options)  # last: arguments that do not fit are refused before it
    write_atomically(options.out / "benchmark.json", json.dumps(result, indent=1) + "\n")
    return write_report(result, options.out)
