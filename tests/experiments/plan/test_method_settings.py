"""The settings in configs/method against the sources named in the files."""

from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer

from experiments.config import RunConfig
from experiments.plan.compose import plan
from experiments.plan.counting import count
from experiments.train import methods
from tests.experiments.train.test_methods import fresh_base, random_backward

PAPER_TASKS = ["commonsense_170k", "metamathqa", "gsm8k"]


def config_of(*arguments: str) -> RunConfig:
    (config,) = plan([*arguments, "recipe.learning_rate=1e-4"])
    return config


@pytest.mark.parametrize("task", PAPER_TASKS)
@pytest.mark.parametrize(
    ("name", "scaling", "dropout"),
    [
        ("lora", 2.0, 0.05),  # AGI-Edgerunners/LLM-Adapters: alpha = 2 r
        ("dora", 2.0, 0.05),  # NVlabs/DoRA
        ("milora", 1.0, 0.05),  # sufenlp/MiLoRA: alpha = r
        ("pissa", 1.0, 0.0),  # GraphPKU/PiSSA: alpha = r, lora_dropout 0
        ("lora_ga", 16 / math.sqrt(8), 0.0),  # Outsider565/LoRA-GA: alpha 16, rank-stabilised
        ("lori_d", 2.0, 0.0),  # juzhengz/LoRI: alpha = 2 r, disable_dropout
    ],
)
def test_scale_and_dropout_of_the_attached_layers_are_the_sources(
    name: str, scaling: float, dropout: float, task: str
) -> None:
    config = config_of(f"method={name}", f"task={task}", "model.adapter_size.rank=8")
    base = fresh_base()
    model = methods.attach(config.method, base, random_backward(base))
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 10  # q, k, v, up and down of two layers
    for layer in layers:
        assert layer.scaling["default"] == pytest.approx(scaling)
        drop = layer.lora_dropout["default"]
        assert (drop.p if isinstance(drop, torch.nn.Dropout) else 0.0) == dropout


def test_lora_gas_scale_at_the_papers_rank() -> None:
    """2.83 at r 32, not 11.3."""
    adapter = config_of("method=lora_ga", "model=llama2_7b", "task=metamathqa").mapping["method"]["adapter"]
    assert adapter["r"] == 32
    assert adapter["use_rslora"]
    assert adapter["lora_alpha"] / math.sqrt(adapter["r"]) == pytest.approx(2.828, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ("llama2_7b", int(0.02 * 32 * 11008) * 4096 + int(0.052 * 32 * 32) * 128 * 4096),  # down 0.02, o 0.052
        ("llama3_8b", int(0.03 * 32 * 14336) * 4096),  # down 0.03
    ],
)
def test_s2ft_trains_the_shares_of_its_scripts(model: str, trained: int) -> None:
    assert count(config_of("method=s2ft", f"model={model}", "task=commonsense_170k")).trainable == trained


@pytest.mark.slow
def test_pissas_rows_of_the_paper_have_the_dropout_they_were_trained_with() -> None:
    """These rows come from MiLoRA's table; elsewhere PiSSA has no dropout, as in its authors' code."""
    for name in ("commonsense", "arithmetic"):
        runs = [config for config in plan([f"experiment={name}"]) if config.method.name == "pissa"]
        of_the_paper = [config for config in runs if config.mapping["method"]["adapter"]["lora_dropout"] == 0.05]
        assert of_the_paper
        assert {config.mapping["method"]["adapter"]["lora_dropout"] for config in runs} <= {0.0, 0.05}


@pytest.mark.parametrize(
    ("label", "alpha", "dropout"),
    [
        ("lora-r64-nf4", 16, 0.1),
        ("lora-r64-gptq2", 16, 0.1),
        ("lora-r64-loftq4", 16, 0.1),
        ("lora-r64-loftq2", 64, 0.1),  # alpha = r below 4 bits
        ("lora-r64-apiq2", 16, 0.0),
    ],
)
def test_lora_on_quantised_bases_is_set_up_as_in_its_source(label: str, alpha: int, dropout: float) -> None:
    runs = [config for config in plan(["experiment=quantized"]) if config.method.label == label]
    assert {
        (r.mapping["method"]["adapter"]["lora_alpha"], r.mapping["method"]["adapter"]["lora_dropout"]) for r in runs
    } == {(alpha, dropout)}
