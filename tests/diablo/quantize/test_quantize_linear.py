"""The layer with packed weights, alone and with adapters of PEFT and DiaBlo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from diablo import DiabloConfig, MiloraConfig
from diablo.quantize import (
    QuantizedLinear,
    merge_dequantized,
    merge_to_grid,
    normal_float,
    replace_linears,
    round_to_nearest,
    sizes,
)
from diablo.quantize import quantized_linear as linear_module
from diablo.quantize.storage import quantized_layers
from tests.diablo.quantized_models import (
    GROUP,
    LINEARS,
    decoder_linears,
    llama,
    logits,
    quantized_llama,
    train_a_little,
)

TOLERANCE: dict[str, Any] = {"atol": 2e-6, "rtol": 1e-5}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "diablo": lambda: DiabloConfig(num_blocks=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def layers() -> list[QuantizedLinear]:
    """Return a layer for each grid, with and without a bias."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(24.0)
    return [
        QuantizedLinear.from_weight(round_to_nearest(weight, 3, 16), bias),
        QuantizedLinear.from_weight(round_to_nearest(weight, 4)),
        QuantizedLinear.from_weight(normal_float(weight, 2, 32)),
    ]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Return an `nn.Linear` with the same weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight.data = layer.dequantize()
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().clone()
    return linear.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_the_gradient_of_x_are_those_of_the_dequantised_layer(dtype: torch.dtype) -> None:
    for layer in layers():
        x, other = inputs(dtype).requires_grad_(), inputs(dtype).requires_grad_()
        y, expected = layer(x), plain(layer, dtype)(other)
        assert y.dtype == dtype
        tolerance: dict[str, Any] = (
            {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.25, "rtol": 0.02}
        )
        torch.testing.assert_close(y, expected, **tolerance)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=1.0)


def test_the_gradient_is_the_derivative() -> None:
    layer, x = layers()[1], inputs().double()[0].requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_under_autocast_the_product_is_taken_in_bf16() -> None:
    layer = layers()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs()).dtype == torch.bfloat16


def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass() -> None:
    for layer in layers():
        kept: list[Tensor] = []
        buffers = {buffer.data_ptr() for buffer in layer.buffers()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            layer(inputs().requires_grad_())
        assert kept
        assert all(tensor.data_ptr() in buffers for tensor in kept)


def test_it_has_no_parameter_but_its_bias_and_a_cast_leaves_the_grid_alone() -> None:
    for layer in layers():
        before = layer.dequantize()
        layer.to(torch.bfloat16)
        assert [name for name, _ in layer.named_parameters()] == (["bias"] if layer.bias is not None else [])
        assert layer.scales.dtype == torch.float16
        assert torch.equal(layer.dequantize(), before)
        assert torch.equal(copy.deepcopy(layer).dequantize(), before)


def test_the_weight_cannot_be_assigned_to() -> None:
    layer = layers()[0]
    before = layer.dequantize()
    with pytest.raises(TypeError, match="merge_dequantized"):
        layer.weight.data += 1
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(torch.zeros(24, 64))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(2, 64, 2.375), (4, 64, 4.375), (3, -1, 3.0 + 24 / 4096)])
def test_bits_per_weight_count_scales_and_zero_points(bits: int, group_size: int, expected: float) -> None:
    """Each group adds a float16 and a byte."""
    layer = QuantizedLinear(4096, 4096, bits, group_size, device="meta")
    assert layer.bits_per_weight == expected


def test_the_bytes_of_a_7b_base_follow_from_shapes_alone() -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    replace_linears(model, decoder_linears(model), bits=2, group_size=64)
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    result = sizes(model)
    assert result["quantized_weights"] == weights
    assert result["quantized_bytes"] == weights * (2 + 16 / 64 + 8 / 64) / 8
    # Embedding and output layer, 65 norms, in float16; the rotary frequencies, twice, in float32.
    assert result["other_bytes"] == 2 * (2 * 32000 * 4096 + 65 * 4096) + 2 * 4 * 64
    assert result["quantized_bytes"] < 1.2 * weights * 2 / 8


def test_only_linear_layers_are_replaced() -> None:
    model = llama()
    with pytest.raises(ValueError, match="lm_head_: nothing there, not a linear layer"):
        replace_linears(model, ["lm_head_"], 2)
    with pytest.raises(ValueError, match=r"model.norm: LlamaRMSNorm there"):
        replace_linears(model, ["model.norm"], 2)
    with pytest.raises(ValueError, match="lm_head: group_size=48 does not divide 64"):
        replace_linears(model, ["lm_head"], 2, 48)


def adapted(name: str, base: Any = None) -> Any:
    base = base or quantized_llama()
    torch.manual_seed(1)
    return get_peft_model(base, ADAPTERS[name]())


@every_adapter
def test_an_adapter_changes_nothing_at_first_and_trains_nothing_else(name: str) -> None:
    model = adapted(name)
    torch.testing.assert_close(logits(model), logits(quantized_llama()), **TOLERANCE)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in key or "diablo_" in key for key in trained)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_a_little(model)
    assert {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])} == trained


@every_adapter
def test_gradients_are_those_on_a_dequantised_base(name: str) -> None:
    dequantised = quantized_llama()
    for key, layer in quantized_layers(dequantised).items():
        parent, _, child = key.rpartition(".")
        setattr(dequantised.get_submodule(parent), child, plain(layer))
    one, other = adapted(name).train(), adapted(name, dequantised).train()
    for model in (one, other):
        model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
    expected = {key: p.grad for key, p in other.named_parameters() if p.requires_grad}
    assert any(grad is not None and grad.abs().max() > 0 for grad in expected.values())
    found = {key: p.grad for key, p in one.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@every_adapter
def test_saved_and_loaded_on_a_fresh_base_it_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    train_a_little(model)
    expected = logits(model.eval())
    model.save_pretrained(str(tmp_path))
    loaded: Any = PeftModel.from_pretrained(quantized_llama(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), expected, **TOLERANCE)


@every_adapter
@pytest.mark.parametrize("normal", [False, True])
def test_merged_into_dequantised_layers_it_gives_the_same_outputs(name: str, normal: bool) -> None:
    model = adapted(name, quantized_llama(bits=2, normal=normal))
    train_a_little(model)
    expected = logits(model.eval())
    merged = merge_dequantized(model)
    assert not quantized_layers(merged)
    assert all(type(linear) is nn.Linear for linear in decoder_linears(merged).values())
    torch.testing.assert_close(logits(merged), expected, **TOLERANCE)


@every_adapter
def test_merged_back_to_the_grid_it_says_what_was_lost(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(name, quantized_llama(bits=4))
    train_a_little(model)
    expected, before = logits(model.eval()), logits(quantized_llama(bits=4))
    exact = merge_dequantized(copy.deepcopy(model))
    result = merge_to_grid(model)
    assert "rounding lost" in capsys.readouterr().out
    merged = quantized_layers(result.model)
    assert len(merged) == LINEARS
    assert 0 < len(result.errors) <= LINEARS
    grids = quantized_layers(quantized_llama(bits=4))
    for key, error in result.errors.items():
        wanted, base = exact.get_submodule(key).weight, grids[key].dequantize()  # pyright: ignore
        lost = ((merged[key].dequantize() - wanted).norm() / (wanted - base).norm()).item()  # pyright: ignore
        assert error == pytest.approx(lost, rel=1e-3)
        assert 0 < error < 1
        assert torch.equal(merged[key].scales, grids[key].scales)
    assert (logits(result.model) - expected).norm() < (before - expected).norm()


@every_adapter
def test_peft_own_merge_is_refused_and_changes_nothing(name: str) -> None:
    model = adapted(name)
    train_a_little(model)
    expected = logits(model.eval())
    for safe in (False, True):
        with pytest.raises(TypeError, match="cannot be changed"):
            model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        HiraConfig(r=4, target_modules=["q_proj"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    ],
    ids=["hira", "oft"],
)
def test_peft_merges_that_write_in_place_are_refused_too(config: Any) -> None:
    model = get_peft_model(quantized_llama(), copy.deepcopy(config))
    train_a_little(model)
    expected = logits(model.eval())
    with pytest.raises(TypeError, match="cannot be changed"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.copy_(w),
        lambda w: w.data.__setitem__(0, 1.0),
        lambda w: torch.add(w, 1, out=w),
        lambda w: setattr(w, "data", w),
    ],
)
def test_nothing_can_be_written_into_the_weight(write: Callable[[Tensor], Any]) -> None:
    layer = QuantizedLinear.from_weight(round_to_nearest(torch.randn(4, 8), 4, 8))
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(TypeError, match="cannot be changed"):
        write(layer.weight)
    assert torch.equal(layer.weight, before)
    assert type(layer.weight + 1) is type(layer.weight.T @ before) is Tensor


def test_rounding_to_bf16_says_what_it_lost(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("diablo", quantized_llama(bits=4))
    train_a_little(model)
    exact = merge_dequantized(copy.deepcopy(model))
    assert capsys.readouterr().out == ""
    rounded = merge_dequantized(model, torch.bfloat16)
    said = capsys.readouterr().out
    base = quantized_layers(quantized_llama(bits=4))
    lost = []
    for name, linear in decoder_linears(rounded).items():
        merged = exact.get_submodule(name).weight
        update = (merged - base[name].dequantize()).norm()  # pyright: ignore
        if update:
            lost.append(((linear.weight.float() - merged).norm() / update).item())  # pyright: ignore
    assert f"merged into bfloat16 in {len(lost)} layers: rounding lost {sum(lost) / len(lost):.1%}" in said


def test_there_is_no_grid_to_merge_to_without_a_quantised_layer() -> None:
    model = adapted("lora", llama())
    with pytest.raises(ValueError, match="no layer of the model is quantised"):
        merge_to_grid(model)


def test_diablo_trains_beside_a_quantised_weight_and_not_in_it() -> None:
    config = DiabloConfig(num_blocks=4, mode="in_place", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"quantised .*use mode='adapter'"):
        get_peft_model(quantized_llama(), config)


def test_starts_that_change_the_base_are_refused() -> None:
    with pytest.raises(ValueError, match="not quantised"):
        get_peft_model(quantized_llama(), MiloraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="cannot be changed"):
        get_peft_model(quantized_llama(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]))


@pytest.mark.parametrize("name", ["lora", "diablo"])
def test_a_weight_is_made_once_in_a_forward_pass_and_once_backwards(name: str, monkeypatch: Any) -> None:
    model, made = adapted(name).train(), []
    original = linear_module.unpack
    monkeypatch.setattr(linear_module, "unpack", lambda *args: made.append(1) or original(*args))
    loss = model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss
    assert len(made) == LINEARS
    loss.backward()
    assert len(made) == 2 * LINEARS - 3  # q, k and v of the first layer: their input needs no gradient


@every_adapter
def test_gradients_under_checkpointing_are_the_same(name: str) -> None:
    one, other = adapted(name).train(), adapted(name).train()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (one, other):
        model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


@every_adapter
def test_trains_on_a_bf16_base_under_autocast_with_float32_parameters(name: str) -> None:
    model = adapted(name, quantized_llama().to(torch.bfloat16)).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss
    loss.backward()
    assert loss.isfinite()
    assert sum(bool(p.grad is not None and p.grad.abs().max() > 0) for p in trained.values()) >= len(trained) / 2


def test_a_bias_that_an_adapter_trains_is_merged() -> None:
    base = llama(attention_bias=True)
    for name, linear in decoder_linears(base).items():
        parent, _, child = name.rpartition(".")
        layer = QuantizedLinear.from_weight(round_to_nearest(linear.weight, 4, GROUP), linear.bias)
        setattr(base.get_submodule(parent), child, layer)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]))
    train_a_little(model)
    expected = logits(model.eval())
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].bias.abs().max() > 0
    torch.testing.assert_close(logits(merge_dequantized(model)), expected, **TOLERANCE)
