# pyright: reportUnknownMemberType=false
"""The suites of `experiments.speed.quantized`: quantising, its errors, training steps, and memory."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM

from diablo.quantize import QuantizationSettings, QuantizedLinear, round_to_nearest, sizes
from diablo.quantize.activations import Activations
from diablo.quantize.apiq import train_block
from diablo.quantize.gptq import inverse_factor
from diablo.quantize.grids import fit_grid, to_codes, uniform, width_of_groups, working
from diablo.quantize.quantized_linear import set_module
from diablo.quantize.storage import decoder_layers
from experiments.errors import UserError
from experiments.models.shapes import build_config, empty_base, resolve_device
from experiments.runs.environment import environment, peak_memory, reset_peak_memory
from experiments.runs.records import write_atomically
from experiments.speed import cases
from experiments.speed.layer_passes import LLAMA_100M, TARGETS
from experiments.speed.quantize_errors import describe_errors, measure_errors
from experiments.speed.timing import forward_backward, interleaved

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diablo.quantize import QuantizedWeight

SUITES = ("quantise", "errors", "step", "memory")
SCHEMA = 1
LLAMA_1B = {  # 1.1 billion parameters, the shapes of TinyLlama-1.1B
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SMALL = {  # for trying out the command
    **LLAMA_100M,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def measure_quantising(options: Any) -> list[dict[str, Any]]:
    """Return seconds of each method, and of GPTQ by a plain loop, over all linear layers of one decoder layer.

    The calibration activations are random and enter as each layer's Gram matrix. Computing them, which all methods but
    rtn, nf and loftq need, is a separate entry.
    """
    model = cast(Any, AutoModelForCausalLM.from_config(build_config(options.architecture), dtype=torch.float32)).eval()
    name, layers = decoder_layers(model)
    ids = torch.randint(model.config.vocab_size, (options.samples, options.length))
    with torch.no_grad():
        activations = Activations(model, layers, ids)
        layer = layers[0]
        seconds = {"activations": _timed(lambda: activations.gram_matrices(f"{name}.0", layer))}
        grams = activations.gram_matrices(f"{name}.0", layer)
        modules = cast("Iterator[tuple[str, nn.Module]]", layer.named_modules())
        linears = {n: m for n, m in modules if isinstance(m, torch.nn.Linear)}
        for method in ("rtn", "nf", "gptq", "magr", "loftq"):
            extra = {"rank": options.rank, "iterations": 1} if method == "loftq" else {}
            settings = QuantizationSettings(method, options.bits, options.group_size, options=extra)
            seconds[method] = _timed(partial(_quantise_all, settings.quantize, linears, grams))
        seconds["gptq, plain loop"] = _timed(partial(_quantise_all, partial(plain_gptq, options), linears, grams))
        outputs = activations.through(f"{name}.0", layer, activations.full)
        seconds["apiq, one epoch"] = _timed(
            lambda: train_block(
                layer,
                activations.quantized,
                activations.kwargs,
                [[output, output] for output in outputs],
                options.bits,
                options.group_size,
                rank=options.rank,
                epochs=1,
            )
        )
    weights = sum(m.in_features * m.out_features for m in linears.values())
    about = {"layers": len(layers), "weights": weights, "samples": options.samples, "length": options.length}
    return [{"entry": entry, "seconds_per_layer": value, **about} for entry, value in seconds.items()]


def _quantise_all(quantise: Callable[..., object], linears: dict[str, nn.Linear], grams: dict[str, Tensor]) -> None:
    for n, linear in linears.items():
        quantise(n, linear.weight, grams[n])


def _timed(work: Callable[[], object]) -> float:
    """Return the median of up to five times if the work is quick, else of one."""
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 3:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def plain_gptq(options: Any, _: str, weight: Tensor, gram: Tensor) -> QuantizedWeight:
    """GPTQ with every column's error applied to all later columns at once, as in its definition."""
    weight = working(weight).clone()
    rows, columns = weight.shape
    group = width_of_groups(columns, options.group_size)
    factor, dead = inverse_factor(gram, 0.01)
    weight[:, dead] = 0
    codes = torch.empty_like(weight)
    scales, zeros = weight.new_empty(rows, columns // group), weight.new_empty(rows, columns // group)
    for j in range(columns):
        index, offset = divmod(j, group)
        if offset == 0:
            scales[:, index], zeros[:, index] = fit_grid(weight[:, j : j + group], options.bits, False, 1.0)
        scale, zero = scales[:, index], zeros[:, index]
        codes[:, j] = to_codes(weight[:, j], scale, zero, options.bits)
        error = (weight[:, j] - scale * (codes[:, j] - zero)) / factor[j, j]
        weight[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return uniform(codes, scales, zeros, options.bits)


def measure_steps(options: Any) -> list[dict[str, Any]]:
    """Measure forward and backward passes of LoRA and DiaBlo (mode adapter) on both bases, and of the frozen bases."""
    full = cast(Any, AutoModelForCausalLM.from_config(build_config(options.architecture), dtype=torch.float32))
    full.to(options.device).config.use_cache = False
    packed = cases.sharing(full)
    pack_linears(packed, options)
    ids = torch.randint(full.config.vocab_size, (max(1, options.tokens // options.length), options.length))
    passes: dict[str, Callable[[], None]] = {}
    for label in (cases.FLOOR, cases.LORA, cases.ADAPTER):
        for base, name in ((full, "full precision"), (packed, f"{options.bits} bits")):
            model = cases.attach(
                label, cases.sharing(base), TARGETS["q k v up down"], options.num_blocks, options.rank, None
            ).train()
            passes[f"{label}, {name}"] = partial(forward_backward, model, ids.to(options.device))
    seconds = interleaved(passes, options.rounds, options.device, title="training passes")
    result: list[dict[str, Any]] = []
    for entry, values in seconds.items():
        floor = seconds[entry.split(", ")[0] + ", full precision"]
        ratio = statistics.median(a / b for a, b in zip(values, floor, strict=True))
        result.append({"entry": entry, "seconds": values, "ratio_to_full_precision": ratio, "tokens": ids.numel()})
    return result


def pack_linears(module: nn.Module, options: Any) -> None:
    """Round to nearest, in place, the linear layers in a decoder layer or a whole model."""
    for name, linear in list(cast("Iterator[tuple[str, nn.Module]]", module.named_modules())):
        if isinstance(linear, torch.nn.Linear) and not isinstance(linear, QuantizedLinear) and "lm_head" not in name:
            with torch.no_grad():
                weight = round_to_nearest(linear.weight, options.bits, options.group_size)
            set_module(module, name, QuantizedLinear.from_weight(weight, linear.bias))


def measure_memory(options: Any) -> list[dict[str, Any]]:
    """Return the peak resident memory of a new process that builds the packed model and runs 16 tokens through it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [pool.apply(_build_packed, (options,))]


def _build_packed(options: Any) -> dict[str, Any]:
    model: Any = empty_base(options.memory_architecture)
    model.to(torch.float16)
    fp16 = sizes(model)["other_bytes"]
    reset_peak_memory("cpu")
    before = peak_memory("cpu")
    for layer in decoder_layers(model)[1]:
        _fill(layer)
        pack_linears(layer, options)
    _fill(model)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # recomputes its frequencies
    with torch.no_grad():
        logits = model(input_ids=torch.arange(16)[None]).logits
    assert not logits.is_meta
    counted = sizes(model)
    return {
        "fp16_bytes": fp16,
        "packed_bytes": counted["quantized_bytes"] + counted["other_bytes"],
        "bits_per_weight": counted["bits_per_weight"],
        "peak_bytes": peak_memory("cpu") - before,  # of the process, without the libraries
    }


def _fill(module: nn.Module) -> None:
    """Replace parameters on the meta device by random numbers."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02)
                setattr(owner, name, torch.nn.Parameter(values, requires_grad=False))


def write_report(result: dict[str, Any], out: Path) -> Path:
    """Write the JSON, and a table of each suite."""
    lines = [f"# Quantised models: {result['bits']} bits in groups of {result['group_size']}", ""]
    if result["quantise"]:
        first, seconds = result["quantise"][0], {row["entry"]: row["seconds_per_layer"] for row in result["quantise"]}
        plain = seconds["gptq, plain loop"]
        lines += [
            f"Seconds per decoder layer of {first['weights']:,} weights ({first['layers']} layers; "
            f"{first['samples']} × {first['length']} calibration tokens).",
            *("", "| entry | seconds per layer | of the plain loop |", "|---|---|---|"),
            *(f"| {entry} | {value:.3g} | {value / plain:.2g} |" for entry, value in seconds.items()),
            "",
        ]
    if result["errors"]:
        lines += describe_errors(result["errors"])
    if result["step"]:
        lines += [
            f"Forward and backward pass over {result['step'][0]['tokens']} tokens, {len(result['step'][0]['seconds'])} "
            f"rounds in turn.",
            *("", "| entry | median seconds | of the same over full precision |", "|---|---|---|"),
            *(
                f"| {row['entry']} | {statistics.median(row['seconds']):.4g} | {row['ratio_to_full_precision']:.2f} |"
                for row in result["step"]
            ),
            "",
        ]
    for row in result["memory"]:
        lines += [
            f"A model of {row['fp16_bytes'] / 1e6:,.0f} MB in fp16 was built and run in at most "
            f"{row['peak_bytes'] / 1e6:,.0f} MB ({row['peak_bytes'] / row['fp16_bytes']:.2f} of it); packed it has "
            f"{row['packed_bytes'] / 1e6:,.0f} MB, {row['bits_per_weight']:.3f} bits per quantised weight.",
            "",
        ]
    write_atomically(out / "quantize_benchmark.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "quantize_benchmark.md", "\n".join(lines))
    return out / "quantize_benchmark.md"


def run(options: Any) -> Path:
    """Run all requested suites; returns the path of the table."""
    options.device = str(resolve_device(options.device))
    options.architecture = SMALL if options.small else LLAMA_100M
    options.memory_architecture = SMALL if options.small else LLAMA_1B
    torch.manual_seed(0)
    measure = {
        **{"quantise": measure_quantising, "errors": measure_errors},
        **{"step": measure_steps, "memory": measure_memory},
    }
    try:
        found = {suite: measure[suite](options) if suite in options.suites else [] for suite in SUITES}
    except ValueError as error:
        raise UserError(str(error)) from None
    about = {key: getattr(options, key) for key in ("bits", "group_size", "rank", "num_blocks")}
    about |= {"architecture": options.architecture, "memory_architecture": options.memory_architecture}
    result = {"schema": SCHEMA, "environment": environment(options.device), **about, **found}
    return write_report(result, options.out)
