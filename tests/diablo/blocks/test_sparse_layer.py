"""Sparse patterns in a model: W0 is never lost, positions are saved and loaded, adapters behave as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import diablo
from diablo import DiabloConfig, SparseConfig
from diablo.blocks.patterns import PATTERNS
from tests.diablo.blocks.test_diablo_tuner import ALL_SEVEN, adapted, tiny_llama, tokens, train
from tests.diablo.blocks.test_in_place import bits
from tests.diablo.blocks.test_in_place_state import assert_holds_the_base

# One pattern for each kind of selection: rows, columns, grid cells, single entries.
KINDS = ["random_row", "random_column", "random_block", "shuffled_diagonal", "random_entry"]
every_kind = pytest.mark.parametrize("pattern", KINDS)


def attach(pattern: str, base: nn.Module | None = None, **fields: Any) -> Any:
    fields = {"density": "1/4", "target_modules": ALL_SEVEN, "task_type": "CAUSAL_LM"} | fields
    return get_peft_model(base or tiny_llama(), SparseConfig(pattern=pattern, **fields))  # pyright: ignore


def trained(pattern: str) -> Any:
    """Return a model on a bf16 base after some training steps."""
    model = attach(pattern, tiny_llama(torch.bfloat16))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {layer.in_weight for layer in adapted(model).values()} == {"default"}
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_number_of_parameters_is_the_density_also_without_weights(pattern: str) -> None:
    model = attach(pattern)
    layers = adapted(model)
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.diablo_blocks["default"].numel() * 4 == layer.in_features * layer.out_features
        assert layer.diablo_blocks["default"].dtype == torch.float32
    with torch.device("meta"):
        empty = tiny_llama()
    without = get_peft_model(empty, model.peft_config["default"], low_cpu_mem_usage=True)
    assert without.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_a_count_gives_every_layer_as_many_rows() -> None:
    for name, layer in adapted(attach("random_row", count=3)).items():
        assert layer.diablo_blocks["default"].shape == (1, 3, layer.out_features), name


def test_layers_of_one_shape_get_different_places() -> None:
    layers = [layer for layer in adapted(attach("random_row")).values() if layer.in_features == 32]
    chosen = {tuple(cast(Tensor, layer.diablo_inputs["default"]).flatten().tolist()) for layer in layers}
    assert len(chosen) == len(layers) == 12


def test_a_layer_that_the_density_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: .*makes 3\.2 of 32 rows"):
        attach("random_row", density="1/10")


@every_kind
def test_the_weight_holds_the_rounded_sum_at_the_chosen_entries(pattern: str) -> None:
    model = trained(pattern)
    fresh = dict(tiny_llama(torch.bfloat16).named_modules())
    for name, layer in adapted(model).items():
        original: Any = fresh[name.removeprefix("base_model.model.")]
        expected = (original.weight.float() + layer.get_delta_weight("default")).bfloat16()
        weight: Any = layer.get_base_layer().weight
        assert torch.equal(weight, expected)
        assert not torch.equal(weight, original.weight)


@every_kind
def test_a_state_dict_and_a_copy_hold_w0(pattern: str) -> None:
    model = trained(pattern)
    logits = model(tokens()).logits
    assert_holds_the_base(model.state_dict())
    other = copy.deepcopy(model)
    train(other, 1)
    assert_holds_the_base(other.state_dict())
    assert torch.equal(model(tokens()).logits, logits)
    assert not torch.equal(other(tokens()).logits, logits)


@every_kind
@pytest.mark.parametrize("leave", ["disable", "unmerge", "switch", "delete", "unload"])
def test_the_weight_is_restored_bit_for_bit(pattern: str, leave: str) -> None:
    model = trained(pattern)
    weights = {name: p for name, p in model.named_parameters() if "diablo_" not in name}  # the live weights
    model.add_adapter("other", SparseConfig(pattern="random_row", density="1/8", target_modules=["lm_head"]))
    logits = model(tokens()).logits
    if leave == "disable":
        model.base_model.disable_adapter_layers()
    elif leave == "unmerge":
        model.merge_adapter()
        assert torch.equal(model(tokens()).logits, logits)
        model.unmerge_adapter()
    elif leave == "switch":
        model.set_adapter("other")
    elif leave == "delete":
        model.delete_adapter("default")
        assert not any("default" in name for name in model.state_dict())
    else:
        model.unload()
    assert_holds_the_base({name: tensor.detach() for name, tensor in weights.items()})


@every_kind
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_holds_its_places_whatever_a_new_draw_would_give(
    pattern: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = trained(pattern)
    logits = model(tokens()).logits
    model.peft_config["default"].seed = 5  # as if later code drew differently
    model.save_pretrained(str(tmp_path))
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"diablo_blocks", "diablo_inputs", "diablo_outputs"}
    loaded = PeftModel.from_pretrained(
        tiny_llama(torch.bfloat16), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert torch.equal(loaded(tokens()).logits, logits)
    assert_holds_the_base(loaded.state_dict())
    train(loaded, 1)
    assert_holds_the_base(loaded.state_dict())
    merged: Any = PeftModel.from_pretrained(tiny_llama(torch.bfloat16), str(tmp_path))
    assert torch.equal(merged.merge_and_unload()(tokens()).logits, logits)


@every_kind
def test_moving_to_another_dtype_moves_w0_and_the_values_each_on_its_own(pattern: str) -> None:
    model = trained(pattern)
    nn.Module.to(model, torch.float32)
    for name, tensor in model.state_dict().items():
        if "diablo_" in name:
            assert tensor.dtype in (torch.float32, torch.int32)
    expected = tiny_llama(torch.bfloat16)
    nn.Module.to(expected, torch.float32)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


@every_kind
def test_both_modes_train_alike(pattern: str) -> None:
    losses = [train(attach(pattern, mode=mode)) for mode in ("in_place", "adapter")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@every_kind
def test_gradients_under_checkpointing_are_the_same(pattern: str) -> None:
    plain, saving = attach(pattern).train(), attach(pattern).train()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, saving):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for one, other in zip(adapted(plain).values(), adapted(saving).values(), strict=True):
        gradients: list[Any] = [layer.diablo_blocks["default"].grad for layer in (one, other)]
        assert torch.equal(*gradients)


def test_two_active_adapters_add_up() -> None:
    model: Any = attach("random_entry", init_weights=False)
    fields: Any = {"density": "1/8", "target_modules": ["q_proj"], "init_weights": False}
    model.add_adapter("other", SparseConfig(pattern="random_row", **fields))
    layer = adapted(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 32)
    with model.disable_adapter():
        frozen = layer.base_layer(x)
    model.base_model.set_adapter(["default", "other"])
    expected = frozen + sum(x @ layer.get_delta_weight(name).T for name in ("default", "other"))
    torch.testing.assert_close(layer(x), expected)


@every_kind
def test_a_layer_that_keeps_its_weight_transposed(pattern: str) -> None:
    """transformers' Conv1D: the same entries of W, beside the weight and merged."""
    linear, conv, x = nn.Linear(32, 16), Conv1D(16, 32), torch.randn(5, 32)
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    config = SparseConfig(pattern=pattern, density="1/4", target_modules=["layer"])
    layers: list[Any] = []
    for base in (linear, conv):
        model: Any = get_peft_model(nn.ModuleDict({"layer": base}), copy.deepcopy(config))  # pyright: ignore
        layers.append(model.base_model.model["layer"])
        torch.manual_seed(0)
        layers[-1].diablo_blocks["default"].data.normal_()
        diablo.refresh(model)
    expected, original = layers[0](x), conv.weight.detach().clone()
    torch.testing.assert_close(layers[1](x), expected)
    layers[1].merge()
    assert not torch.equal(conv.weight, original)
    torch.testing.assert_close(layers[1](x), expected)
    layers[1].unmerge()
    assert bits(conv.weight) == bits(original)


def test_values_changed_by_hand_are_seen_after_refresh() -> None:
    model = attach("random_entry")
    for layer in adapted(model).values():
        layer.diablo_blocks["default"].data.add_(0.1)
    diablo.refresh(model)
    layer = next(iter(adapted(model).values()))
    with model.disable_adapter():
        frozen = layer.base_layer(torch.ones(1, 32))
    torch.testing.assert_close(
        layer(torch.ones(1, 32)), frozen + layer.get_delta_weight("default").sum(1), atol=1e-5, rtol=1e-5
    )


def test_the_diagonal_pattern_is_diablo() -> None:
    losses = train(attach("diagonal", mode="in_place"))
    config = DiabloConfig(num_blocks=4, target_modules=ALL_SEVEN, task_type="CAUSAL_LM", mode="in_place")
    assert losses == train(get_peft_model(tiny_llama(), config))
