"""Output errors of each quantizer on the tiny model's layers, for the calibration inputs."""

from __future__ import annotations

from typing import Any

import torch

from diablo.quantize import QuantizationSettings
from diablo.quantize.activations import Activations
from diablo.quantize.storage import decoder_layers
from experiments.models.full_precision import load_full_precision
from experiments.models.quantized import calibration_tokens
from experiments.plan.compose import plan

BITS = (2, 3, 4)
METHODS = ("rtn", "nf", "gptq", "magr")  # methods whose weights are used without a LoRA


def measure_errors(options: Any) -> list[dict[str, Any]]:
    """Return one row per method, bits and layer: `error`, `||X (Q - W)ᵀ||²`, and `size`, `||X Wᵀ||²`.

    All methods get the same X, from the unquantised model on the training rows of `arith`, and use the tiny model's own
    group size.
    """
    steps = ["model.pretraining.steps=4"] if options.small else []
    (config,) = plan(["model=tiny", "task=arith", "method=diablo", "quantization=gptq", "quantization.bits=4", *steps])
    base, _ = load_full_precision(config)
    tokens = calibration_tokens(config)
    assert tokens is not None
    assert config.quantization is not None
    group = config.quantization.group_size
    rows: list[dict[str, Any]] = []
    prefix, layers = decoder_layers(base.eval())
    with torch.no_grad():
        activations = Activations(base, layers, tokens)
        for index, layer in enumerate(layers):
            name = f"{prefix}.{index}"
            for linear, gram in activations.gram_matrices(name, layer).items():
                weight: Any = layer.get_submodule(linear).weight
                size = ((weight @ gram) * weight).sum().item()
                for bits in BITS:
                    for method in METHODS:
                        quantized, _ = QuantizationSettings(method, bits, group).quantize(linear, weight, gram)
                        difference = quantized.dequantize() - weight
                        error = ((difference @ gram) * difference).sum().item()
                        about = {"method": method, "bits": bits, "group_size": group, "layer": f"{name}.{linear}"}
                        rows.append({**about, "error": error, "size": size})
            activations.quantized = activations.through(name, layer, activations.quantized)
    return rows


def describe_errors(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of the summed errors, and the layers where GPTQ's error is not below rounding's."""
    found = {(row["method"], row["bits"], row["layer"]): row["error"] for row in rows}
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    size = sum({row["layer"]: row["size"] for row in rows}.values())
    lines = [
        f"Squared error of the outputs of the tiny model's {len(layers)} linear layers over the outputs' own squares, "
        f"both summed, in groups of {rows[0]['group_size']}; in brackets over that of rounding to nearest.",
        "",
        f"| bits | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
    ]
    exceptions: list[str] = []
    for bits in BITS:
        totals = {method: sum(found[method, bits, layer] for layer in layers) for method in METHODS}
        cells = [f"{totals[method] / size:.3%} ({totals[method] / totals['rtn']:.2f})" for method in METHODS]
        lines.append(f"| {bits} | {' | '.join(cells)} |")
        for better, worse in (("gptq", "rtn"), ("magr", "gptq")):
            names = [layer for layer in layers if found[better, bits, layer] >= found[worse, bits, layer]]
            listed = f": {', '.join(names)}" if 0 < len(names) < len(layers) else ""
            exceptions.append(
                f"- {bits} bits, {better} not below {worse} in {len(names)} of {len(layers)} layers{listed}"
            )
    return [*lines, "", *exceptions, ""]
