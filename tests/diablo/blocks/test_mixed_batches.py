"""Several adapters and the base in one batch, and sums of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from diablo import BottleneckConfig, DiabloConfig, SparseConfig
from tests.diablo.blocks.test_diablo_tuner import adapted, attach, tiny_llama, tokens

TARGETS = ["q_proj", "k_proj", "down_proj"]
COMMON: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[[int], Any]] = {
    "adapter": lambda n: DiabloConfig(num_blocks=2 * n, mode="adapter", **COMMON),
    "in_place": lambda n: DiabloConfig(num_blocks=2 * n, mode="auto" if n > 1 else "in_place", **COMMON),
    "sparse": lambda n: SparseConfig(pattern="random_block", density="1/4", seed=n, **COMMON),
    "bottleneck": lambda n: BottleneckConfig(bottleneck_size=4 * n, **COMMON),
}
NAMES = ["default", "__base__", "other", "other", "default", "__base__"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def two_adapters(kind: str) -> PeftModel:
    torch.manual_seed(3)
    model = PeftModel(tiny_llama(), KINDS[kind](1))
    model.add_adapter("other", KINDS[kind](2))
    for name, parameter in model.named_parameters():
        if "diablo_blocks" in name or "bottleneck_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def alone(model: PeftModel, name: str) -> torch.Tensor:
    ids = tokens(batch=6)
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(input_ids=ids).logits
        model.set_adapter(name)
        logits = model(input_ids=ids).logits
        model.set_adapter("default")
        return logits


@every_kind
def test_every_row_is_as_with_its_adapter_alone(kind: str) -> None:
    model = two_adapters(kind)
    before = alone(model, "default")
    with torch.no_grad():
        mixed = model(input_ids=tokens(batch=6), adapter_names=NAMES).logits
    outputs = {name: alone(model, name) for name in set(NAMES)}
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], outputs[name][row], atol=1e-5, rtol=1e-5)
        for other in set(NAMES) - {name}:
            assert not torch.allclose(mixed[row], outputs[other][row], atol=1e-2)
    assert torch.equal(alone(model, "default"), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@every_kind
def test_generation_with_beams_keeps_each_rows_adapter(kind: str) -> None:
    model = two_adapters(kind)
    more: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=tokens(), adapter_names=["other", "__base__", "default"], **more)
    model.set_adapter("other")
    assert torch.equal(mixed[0], model.generate(input_ids=tokens()[:1], **more)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=tokens()[1:2], **more)[0])


@every_kind
def test_what_a_mixed_batch_cannot_have_is_refused(kind: str) -> None:
    model = two_adapters(kind)
    with pytest.raises(ValueError, match="adapter_names: no adapter defualt: choose from default, other"):
        model(input_ids=tokens(), adapter_names=["defualt", "other", "__base__"])
    with pytest.raises(ValueError, match="adapter_names: 2 names for 3 rows"):
        model(input_ids=tokens(), adapter_names=["other", "__base__"])
    with pytest.raises(ValueError, match="adapter_names is for inference"):
        model.train()(input_ids=tokens(), adapter_names=["other"] * 3)
    if kind != "bottleneck":
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="adapter_names cannot be used while adapters are merged"):
            model(input_ids=tokens(), adapter_names=["other"] * 3)
    assert not any(module._forward_pre_hooks for module in model.modules())


# Sums of adapters


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_a_weighted_adapter_is_the_sum_of_updates(mode: str) -> None:
    torch.manual_seed(3)
    model: Any = attach(tiny_llama(), mode=mode, init_weights=False)
    model.add_adapter("other", DiabloConfig(**{**COMMON, "target_modules": model.peft_config["default"].target_modules},
                                            num_blocks=4, init_weights=False))  # fmt: skip
    model.add_weighted_adapter(["default", "other"], [0.75, -2.0], "sum")
    assert model.active_adapter == "default"
    for layer in adapted(model).values():
        expected = 0.75 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
        assert layer.diablo_blocks["sum"].dtype == torch.float32
        assert not layer.diablo_blocks["sum"].requires_grad
    model.set_adapter("sum")
    logits = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, logits, atol=1e-4, rtol=1e-4)


def test_adapters_that_have_no_sum_are_refused() -> None:
    for kind in ("adapter", "sparse"):
        model: Any = two_adapters(kind)
        with pytest.raises(ValueError, match="q_proj: adapters default, other train different entries"):
            model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
        with pytest.raises(ValueError, match="no adapter third: choose from"):
            model.add_weighted_adapter(["third"], [1.0], "sum")
        with pytest.raises(ValueError, match="combination_type='svd'"):
            model.add_weighted_adapter(["default"], [1.0], "sum", "svd")
        with pytest.raises(ValueError, match="1 adapters and 2 weights"):
            model.add_weighted_adapter(["default"], [1.0, 2.0], "sum")
        with pytest.raises(ValueError, match="adapter_name='other' is taken"):
            model.add_weighted_adapter(["default"], [1.0], "other")
        assert set(model.peft_config) == {"default", "other"}
    bottleneck: Any = two_adapters("bottleneck")
    with pytest.raises(ValueError, match="bottlenecks are not linear"):
        bottleneck.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
