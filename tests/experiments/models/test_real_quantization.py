"""Every quantizer on real weights: an adapter is trained and scored on its model, and its error is bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diablo.quantize import QuantizedLinear, quantized_layers, round_to_nearest
from diablo.quantize.quantized_linear import set_module
from eval.run import evaluate
from experiments.models.full_precision import load_full_precision
from experiments.models.load import load_base
from experiments.models.quantized import calibration_tokens
from experiments.plan.compose import options
from experiments.plan.counting import count
from experiments.runs.config_files import read_config
from experiments.runs.records import read_lines
from experiments.settings import with_values
from experiments.train import methods
from experiments.train.run import train
from tests.conftest import planned
from tests.diablo.quantized_models import decoder_linears
from tests.real_runs import keep_shortest_rows, settings

pytestmark = pytest.mark.real

BITS, GROUP = 3, 64
# Each must have less error than rounding; normal-float only fits the distribution of the weights.
PROMISES = {"rtn": False, "nf": False, "gptq": True, "magr": True, "loftq": True, "apiq": True}
METHODS = {"loftq": "lora", "apiq": "lora"}  # the required adapter, if any
CALIBRATION = {"text": None, "samples": 16, "length": 64, "seed": 0}
CALIBRATED = [f"quantization.calibration.{key}={CALIBRATION[key]}" for key in ("samples", "length")]
QUICK = {
    "gptq": CALIBRATED,
    "magr": [*CALIBRATED, "quantization.options.iterations=5"],
    "apiq": [*CALIBRATED, "quantization.options.epochs=1"],
    "loftq": ["quantization.options.iterations=1"],
}


def output_error(model: Any, wanted: Sequence[Tensor], tokens: Tensor) -> float:
    """Return the relative squared error of the decoder layers' outputs, averaged over layers and positions."""
    pairs = zip(layer_outputs(model, tokens), wanted, strict=True)
    errors = [(one - other).square().sum(-1) / other.square().sum(-1) for one, other in pairs]
    return torch.stack(errors).mean().item()


def layer_outputs(model: Any, tokens: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return model(input_ids=tokens, output_hidden_states=True, logits_to_keep=1).hidden_states[1:]


def rounded(model: Any) -> Any:
    for name, linear in decoder_linears(model).items():
        set_module(model, name, QuantizedLinear.from_weight(round_to_nearest(linear.weight, BITS, GROUP)))
    return model


@pytest.mark.parametrize("name", [name for name in options("quantization") if name != "none"])
def test_every_quantizer_with_an_adapter(
    name: str, smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_shortest_rows(monkeypatch, 64)
    quantization = [f"quantization={name}", f"quantization.bits={BITS}", *QUICK.get(name, ())]
    adapter = [f"method={METHODS.get(name, 'diablo')}", "recipe.learning_rate=1e-3", "recipe.max_steps=2"]
    run = planned(
        [
            *smollm2_slice, *settings(tmp_path, data_root), *quantization, *adapter,
            *("evaluation.benchmarks=[mawps]", "evaluation.limit=2", f"quantization.group_size={GROUP}"),
        ]
    )  # fmt: skip
    config, record = read_config(run), train(run)
    assert all(math.isfinite(line["loss"]) for line in read_lines(run.metrics))
    assert record.changed
    assert (record.trainable_parameters, record.base_parameters) == (count(config).trainable, count(config).base)
    (scored,) = evaluate(run)
    assert (scored.n, scored.identity, scored.base_hash) == (2, False, record.base_hash)

    tokens = calibration_tokens(with_values(config, {"quantization.calibration": CALIBRATION}))
    assert tokens is not None
    full = load_full_precision(config)[0]
    wanted = layer_outputs(full, tokens)
    # Before training, with the quantizer's own LoRA if it makes one.
    start = methods.attach(config.method, load_base(config)[0])
    assert len(quantized_layers(start)) == 3 * 7
    error = output_error(start, wanted, tokens)
    rounding = output_error(rounded(full), wanted, tokens)
    if name == "rtn":
        assert error == pytest.approx(rounding, rel=1e-4)
    assert 0 < error < (rounding if PROMISES[name] else 1)
