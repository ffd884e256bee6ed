"""In-place layers used by other code: W0 is never lost and D is never added twice."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import diablo
from diablo import DiabloConfig
from tests.diablo.blocks.test_diablo_tuner import adapted, attach, tiny_llama, tokens, train
from tests.diablo.blocks.test_in_place import Mode, bits, blocks_of, layer_of, rounded_sum, weight_of

# W0 and D are each counted once


@pytest.fixture
def in_mid_training() -> Any:
    model = attach(tiny_llama(torch.bfloat16), mode="in_place")
    train(model)
    assert {layer.in_weight for layer in adapted(model).values()} == {"default"}
    return model


def base_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): tensor
        for name, tensor in state.items()
        if "diablo_" not in name
    }


def assert_holds_the_base(state: dict[str, Tensor]) -> None:
    fresh = tiny_llama(torch.bfloat16).state_dict()
    assert {name: bits(tensor) for name, tensor in base_names(state).items()} == {
        name: bits(tensor) for name, tensor in fresh.items()
    }


def test_a_state_dict_holds_w0_and_goes_on_holding_it(in_mid_training: Any) -> None:
    trained = in_mid_training(tokens()).logits
    state = in_mid_training.state_dict()
    assert_holds_the_base(state)
    assert torch.equal(in_mid_training(tokens()).logits, trained)
    train(in_mid_training, 1)
    assert_holds_the_base(state)


def test_saved_and_loaded_on_a_fresh_base_computes_the_same(in_mid_training: Any, tmp_path: Path) -> None:
    trained = in_mid_training(tokens()).logits
    in_mid_training.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (False, True):
        base = tiny_llama(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(tokens()).logits, trained)
        assert_holds_the_base(loaded.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_full_state_dict_loads_into_another_model_in_place(in_mid_training: Any, assign: bool) -> None:
    other = attach(tiny_llama(torch.bfloat16), mode="in_place", init_weights=False)
    other.load_state_dict(in_mid_training.state_dict(), assign=assign)
    assert torch.equal(other(tokens()).logits, in_mid_training(tokens()).logits)
    assert_holds_the_base(other.state_dict())


def copy_by_pickle(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy_by_pickle])
def test_a_copy_trains_on_by_itself(in_mid_training: Any, copied: Callable[[PeftModel], PeftModel]) -> None:
    before = in_mid_training(tokens()).logits
    other = copied(in_mid_training)
    assert_holds_the_base(other.state_dict())
    assert torch.equal(other(tokens()).logits, before)
    train(other, 3)
    assert torch.equal(in_mid_training(tokens()).logits, before)
    assert not torch.equal(other(tokens()).logits, before)
    assert_holds_the_base(other.state_dict())
    with other.disable_adapter():
        assert torch.equal(other(tokens()).logits, tiny_llama(torch.bfloat16)(tokens()).logits)


@pytest.mark.parametrize("leave", ["disable", "unmerge", "switch", "delete", "unload"])
def test_the_weight_is_restored_bit_for_bit(in_mid_training: Any, leave: str) -> None:
    model: Any = in_mid_training
    weights = {name: p for name, p in model.named_parameters() if "diablo_" not in name}  # the live weights
    model.add_adapter("other", DiabloConfig(num_blocks=4, target_modules=["lm_head"], mode="in_place"))
    if leave == "disable":
        model.base_model.disable_adapter_layers()
    elif leave == "unmerge":
        model.merge_adapter()
        model.unmerge_adapter()
    elif leave == "switch":
        model.set_adapter("other")
    elif leave == "delete":
        model.delete_adapter("default")
    else:
        model.unload()
    assert_holds_the_base({name: tensor.detach() for name, tensor in weights.items()})


def test_adapters_switched_in_mid_training_keep_their_own_updates() -> None:
    model = attach(tiny_llama(), mode="in_place")
    model.add_adapter("other", DiabloConfig(num_blocks=8, target_modules=["q_proj", "v_proj"], mode="in_place"))
    alone = {
        name: attach(tiny_llama(), mode="in_place", **settings)
        for name, settings in (("default", {}), ("other", {"num_blocks": 8, "target_modules": ["q_proj", "v_proj"]}))
    }
    optimizers = {}
    for _ in range(2):
        for name in ("default", "other"):
            model.set_adapter(name)
            for owner in (model, alone[name]):
                trainable = [p for p in owner.parameters() if p.requires_grad]
                optimizer = optimizers.setdefault((name, id(owner)), torch.optim.SGD(trainable, lr=0.1))
                owner(input_ids=tokens(), labels=tokens()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    for name in ("default", "other"):
        model.set_adapter(name)
        assert torch.equal(model(tokens()).logits, alone[name](tokens()).logits)


def test_moving_to_another_dtype_moves_w0_and_d_each_on_its_own(in_mid_training: Any) -> None:
    layer = next(iter(adapted(in_mid_training).values()))
    original = tiny_llama(torch.bfloat16).get_parameter("model.layers.0.self_attn.q_proj.weight")
    for dtype in (torch.float32, torch.float64):
        in_mid_training.to(dtype)
        assert torch.equal(weight_of(layer), rounded_sum(layer, original.to(dtype)))
    in_mid_training.to(torch.bfloat16)
    assert_holds_the_base(in_mid_training.state_dict())


def test_blocks_changed_by_hand_are_written_by_refresh() -> None:
    base: Any = nn.Sequential(nn.Linear(32, 32))
    original = base[0].weight.detach().clone()
    config = DiabloConfig(num_blocks=2, target_modules=["0"])
    model: Any = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    layer: Any = base[0]
    assert layer.in_weight == "default"
    blocks_of(layer).data.fill_(0.5)
    diablo.refresh(model)
    assert torch.equal(weight_of(layer), rounded_sum(layer, original))


def test_a_merged_model_can_be_moved_and_unmerged() -> None:
    model = attach(tiny_llama(torch.bfloat16), init_weights=False)
    model.merge_adapter()
    model.to(torch.float32)
    model.unmerge_adapter()
    model.to(torch.bfloat16)
    assert_holds_the_base(model.state_dict())


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_blocks_stay_in_float32_whatever_the_base_is_cast_to(mode: Mode) -> None:
    base: Any = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
    config = DiabloConfig(num_blocks=2, target_modules=["0"], mode=mode, init_weights=False)
    model: Any = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    blocks = blocks_of(base[0])
    before = blocks.detach().clone()
    model.half().bfloat16()
    assert base[0].base_layer.weight.dtype == torch.bfloat16
    assert blocks.dtype == torch.float32
    assert torch.equal(blocks, before)


# Other code that uses a layer


def test_an_adapter_that_transformers_loads_is_computed_with(in_mid_training: Any, tmp_path: Path) -> None:
    """transformers sets parameters one by one instead of loading a state dict."""
    in_mid_training.save_pretrained(str(tmp_path / "adapter"))
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    trained = in_mid_training(tokens()).logits
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "adapter"))
    # transformers leaves the blocks in the base's dtype, so that they are rounded once more than ours
    torch.testing.assert_close(model(tokens()).logits, trained, rtol=0, atol=0.05 * trained.abs().max().item())
    assert (trained - tiny_llama(torch.bfloat16)(tokens()).logits).abs().max() > 0.2 * trained.abs().max()


def test_blocks_changed_in_sight_of_autograd_are_seen_at_the_next_forward_pass() -> None:
    base = nn.Linear(32, 32)
    layer = layer_of("in_place", base)
    x = torch.randn(3, 32)
    with torch.no_grad():
        blocks_of(layer).add_(1.0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, rounded_sum(layer, base.weight), base.bias))
    layer.diablo_blocks["default"] = nn.Parameter(torch.ones(2, 16, 16))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, rounded_sum(layer, base.weight), base.bias))


def test_loading_keeps_every_bit_of_the_blocks(in_mid_training: Any, tmp_path: Path) -> None:
    in_mid_training.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (False, True):
        base = tiny_llama(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        for name, layer in adapted(loaded).items():
            assert torch.equal(blocks_of(layer), blocks_of(adapted(in_mid_training)[name]))


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_a_model_that_is_offloaded_after_attaching_is_refused(mode: Mode) -> None:
    from accelerate import cpu_offload

    model = attach(tiny_llama(), mode=mode, init_weights=False)
    cpu_offload(model.base_model, execution_device=torch.device("cpu"))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"mode='adapter'|offload the base model before attaching"):
        model(tokens())


def test_a_hook_that_comes_later_is_refused_and_not_passed_over() -> None:
    layer = layer_of("in_place", nn.Linear(32, 32))
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"has since got hooks on the base layer, .*: use mode='adapter'"):
        layer(torch.randn(1, 32))


def test_an_unloaded_layer_writes_no_more() -> None:
    model: Any = attach(tiny_llama(), mode="in_place")
    layers = list(adapted(model).values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    base = model.unload()
    optimizer.step()
    assert layers
    assert torch.equal(base(tokens()).logits, tiny_llama()(tokens()).logits)


def test_a_merge_of_another_adapter_makes_an_open_backward_pass_fail() -> None:
    layer = layer_of("in_place", nn.Linear(8, 8))
    layer.update_layer("other", DiabloConfig(num_blocks=4, init_weights=False))
    x = torch.randn(2, 8, requires_grad=True)
    renamed = layer(x).sum()
    layer.merge(adapter_names=["default"])
    renamed.backward()  # the weight is unchanged
    layer.unmerge()
    layer.refresh()
    stale = layer(x).sum()
    layer.merge(adapter_names=["default", "other"])
    with pytest.raises(RuntimeError, match="have changed since the forward pass"):
        stale.backward()


def test_a_frozen_adapter_in_place_passes_gradients_on_through_a_reference_pass() -> None:
    layer = layer_of("in_place", nn.Linear(8, 8), inference_mode=True)
    assert not blocks_of(layer).requires_grad
    x = torch.randn(2, 8, requires_grad=True)
    output = layer(x).sum()
    layer.enable_adapters(False)
    layer.enable_adapters(True)
    output.backward()
    torch.testing.assert_close(x.grad, weight_of(layer).sum(0).expand(2, 8))


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_an_input_of_another_dtype_is_refused_in_training_as_without_gradients(mode: Mode) -> None:
    layer = layer_of(mode, nn.Linear(32, 32, dtype=torch.bfloat16))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match="same dtype"):
            layer(torch.randn(2, 32))
