"""The contract of tests/experiments/train/test_methods.py on real weights, tokens and rows, through the whole pipeline.

Every method on the first three layers of SmolLM2-135M; DiaBlo, LoRA and full fine-tuning also on all thirty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from experiments import CONFIGS
from experiments.config import Method, RunConfig
from experiments.data.prompts import encode
from experiments.errors import UserError
from experiments.models.load import load_base
from experiments.models.shapes import weights_hash
from experiments.plan.counting import count
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, TrainRecord, read_lines
from experiments.train import methods
from experiments.train.run import train
from tests.conftest import planned
from tests.experiments.train.test_methods import base_weights, contract_of, every_method
from tests.real_runs import keep_shortest_rows, settings

pytestmark = pytest.mark.real

N, RANK = 32, 11  # of configs/model/smollm2_135m.yaml
VOCABULARY, HIDDEN, INNER, KEYS = 49152, 576, 1536, 192
SHAPES = {  # in, out
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, KEYS), "v_proj": (HIDDEN, KEYS), "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN),
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SMT_BLOCKS = 53  # a tenth of the full model's 532, for a tenth of its layers


def over(entries: Callable[[int, int], int], modules: tuple[str, ...] = TARGETS) -> int:
    """Return the sum of `entries(in, out)` over the modules of one layer."""
    return sum(entries(*SHAPES[name]) for name in modules)


def lora(rank: int) -> int:
    return over(lambda rows, columns: rank * (rows + columns))


FORMULAS: dict[str, Callable[[int], int]] = {  # layers -> trained parameters, for the sizes of the model's file
    "base": lambda layers: 0,
    "full": lambda layers: VOCABULARY * HIDDEN + HIDDEN + layers * (2 * HIDDEN + over(lambda i, o: i * o, (*SHAPES,))),
    "diablo": lambda layers: layers * over(lambda i, o: i * o // N),
    "sparse": lambda layers: layers * over(lambda i, o: i * o // N),
    "lora": lambda layers: layers * lora(RANK),
    "lora_ga": lambda layers: layers * lora(RANK),
    "milora": lambda layers: layers * lora(RANK),
    "pissa": lambda layers: layers * lora(RANK),
    "dora": lambda layers: layers * (lora(RANK) + over(lambda i, o: o)),
    "lori_d": lambda layers: layers * over(lambda i, o: RANK * o),
    "lori_s": lambda layers: int(0.1 * layers * over(lambda i, o: RANK * o)),
    "paca": lambda layers: layers * over(lambda i, o: 2 * RANK * o),
    "s2ft": lambda layers: int(0.082 * layers * INNER) * HIDDEN,
    "smt": lambda layers: SMT_BLOCKS * 64**2,
    "ia3": lambda layers: layers * (KEYS + KEYS + INNER),
    "bottleneck": lambda layers: layers * 2 * (2 * HIDDEN * 3 * RANK + 3 * RANK + HIDDEN),
    "prefix": lambda layers: layers * 2 * 10 * KEYS,
    "prompt": lambda layers: 20 * HIDDEN,
}
TIES = {"lori_s": 0.01}  # tolerance: all of equally large entries are chosen, and few steps leave such ties
# Learning rates for a few steps: those chosen for the toy are unstable on real weights, a quarter of them is not.
WHOLE = {"diablo": 3e-3, "lora": 3e-3, "full": 1e-4}


@dataclass
class Trained:
    """A finished run, its model after training, and hashes of every tensor before the first step."""

    run: RunPaths
    config: RunConfig
    record: TrainRecord
    model: nn.Module
    start: dict[str, str]
    base_at_start: dict[str, str]


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: weights_hash({"": tensor}) for name, tensor in tensors.items()}


@lru_cache
def fresh_hashes(path: str, dtype: str) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    return hashes(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict())


def train_watched(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Train a run through the pipeline and keep its model in memory."""
    run = planned(arguments)
    config = read_config(run)
    names = fresh_hashes(str(config.model.path), config.model.dtype).keys()
    initial, save, kept = methods.initial_state, methods.save, {}

    def at_start(model: nn.Module) -> dict[str, Tensor]:
        kept["start"], kept["base"] = hashes(model.state_dict()), hashes(base_weights(model, names))
        return initial(model)

    def at_end(method: Method, model: nn.Module, *rest: Any) -> None:
        kept["model"] = model
        save(method, model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "initial_state", at_start)
        patch.setattr(methods, "save", at_end)
        record = train(run)
    return Trained(run, config, record, kept["model"].eval(), kept["start"], kept["base"])


def check_training(found: Trained, name: str, layers: int) -> None:
    """Check that the loss fell on repeated rows, and that only the counted trainable parameters changed."""
    record, trained = found.record, methods.trained_tensors(found.model)
    places = {tensor.data_ptr() for tensor in trained.values()}  # a tied tensor has a second name
    after = hashes(found.model.state_dict())
    for key, tensor in found.model.state_dict().items():
        assert (after[key] == found.start[key]) == (tensor.data_ptr() not in places), key
    fresh = fresh_hashes(str(found.config.model.path), found.config.model.dtype)
    changed = {key for key in fresh if found.base_at_start[key] != fresh[key]}
    assert bool(changed) == contract_of(name)["changes_base_at_start"]
    assert all(key.split(".")[-2] in TARGETS for key in changed)
    counted = count(found.config).trainable
    assert counted == FORMULAS[name](layers)
    assert counted <= record.trainable_parameters <= counted * (1 + TIES.get(name, 0))
    assert record.base_parameters == count(found.config).base == FORMULAS["full"](layers)
    if name == "base":
        assert record.steps == 0
        return
    losses = [line["loss"] for line in read_lines(found.run.metrics)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert record.changed


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits[:, -tokens.shape[1] :]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def check_loading(found: Trained, name: str, rounding: float) -> None:
    """Check that the adapter, saved and loaded on a fresh base, gives the same logits, also merged if possible."""
    method = found.config.method
    fresh, tokenizer = load_base(found.config)
    row = {"instruction": "Ann has 3 apples and buys 4 more. How many are there?", "input": "", "output": "7"}
    tokens = torch.tensor([encode(found.config.protocol, tokenizer, [row])[0].input_ids])
    expected, untrained = logits(found.model, tokens), logits(fresh, tokens)
    loaded = methods.load(method, fresh, found.run.adapter, merge=False).eval()
    assert relative(logits(loaded, tokens), expected) < rounding
    assert (relative(untrained, expected) > 5 * rounding) == (name != "base")
    fresh, _ = load_base(found.config)
    if not contract_of(name)["merges"]:
        with pytest.raises(UserError, match="cannot be merged into the base's weights"):
            methods.load(method, fresh, found.run.adapter, merge=True)
        return
    merged = methods.load(method, fresh, found.run.adapter, merge=True).eval()
    assert not any("lora" in key or "diablo" in key for key in merged.state_dict())
    assert relative(logits(merged, tokens), expected) < rounding


def of_method(name: str) -> list[str]:
    content = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
    few = ["method.prepare.steps=4"] if "steps" in content.get("prepare", {}) else []  # of a warm-up
    rate = content["learning_rate"]["arith"] / 4
    return [f"method={name}", f"recipe.learning_rate={rate}", f"model.adapter_size.smt_blocks={SMT_BLOCKS}", *few]


def run_settings(tmp_path: Path, data_root: Path) -> list[str]:
    """Settings of a task with learning rates for every first run; without dropout, so that DiaBlo trains in place."""
    task = ["task=gsm8k", "task.data.source=mawps", "recipe.adapter_dropout=0", "recipe.max_steps=5"]
    return [*settings(tmp_path, data_root), *task]


@every_method
def test_every_method_on_three_layers(
    name: str, smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_shortest_rows(monkeypatch)
    arguments = [*smollm2_slice, *run_settings(tmp_path, data_root), *of_method(name)]
    found = train_watched(arguments, monkeypatch)
    check_training(found, name, layers=3)
    check_loading(found, name, rounding=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_on_all_thirty_layers(
    name: str, smollm2: Path, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_shortest_rows(monkeypatch)
    rate = [f"method={name}", f"recipe.learning_rate={WHOLE[name]}", "recipe.max_steps=3"]
    arguments = ["model=smollm2_135m", f"model.path={smollm2}", *run_settings(tmp_path, data_root), *rate]
    found = train_watched(arguments, monkeypatch)
    check_training(found, name, layers=30)
    check_loading(found, name, rounding=1e-5)


@pytest.mark.parametrize("name", ["diablo", "lora"])
def test_in_bfloat16(
    name: str, smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 base with autocast and float32 adapters. Two rows, since a CPU may be 25 times slower than in float32."""
    keep_shortest_rows(monkeypatch, 2)
    few = ["model.dtype=bfloat16", "recipe.batch_size=2", "recipe.micro_batch_size=2", "recipe.max_steps=3"]
    arguments = [*smollm2_slice, *run_settings(tmp_path, data_root), *of_method(name), *few]
    found = train_watched(arguments, monkeypatch)
    assert found.record.dtype == "bfloat16"
    assert {tensor.dtype for tensor in methods.trained_tensors(found.model).values()} == {torch.float32}
    assert next(iter(load_base(found.config)[0].parameters())).dtype == torch.bfloat16
    check_training(found, name, layers=3)
    check_loading(found, name, rounding=1e-2)
