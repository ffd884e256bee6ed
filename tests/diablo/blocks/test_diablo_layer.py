"""A single DiaBlo layer: forward pass, dropout, merging, quantised base layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Literal

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo import DiabloConfig, DiabloLinear, SparseConfig


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_one_block_trains_like_the_full_weight(mode: Literal["adapter", "in_place"]) -> None:
    full = nn.Linear(6, 4, dtype=torch.float64)
    layer = DiabloLinear(copy.deepcopy(full), "default", DiabloConfig(num_blocks=1, mode=mode))
    x = torch.randn(5, 6, dtype=torch.float64)
    steps = (torch.optim.AdamW([full.weight], lr=0.1, weight_decay=0.0),)
    steps += (torch.optim.AdamW(layer.diablo_blocks.parameters(), lr=0.1, weight_decay=0.0),)
    for _ in range(5):
        for module, optimizer in zip((full, layer), steps, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert isinstance(layer.base_layer, nn.Linear)
    layer.enable_adapters(False)
    trained = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(trained, full.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_inputs_of_any_dimension(shape: tuple[int, ...]) -> None:
    layer = DiabloLinear(nn.Linear(8, 4), "default", DiabloConfig(num_blocks=2, init_weights=False))
    x = torch.randn(shape)
    assert isinstance(layer.base_layer, nn.Linear)
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.base_layer.bias))


def test_dropout_drops_the_adapter_s_input_only() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 8)
    zero = DiabloLinear(base, "default", DiabloConfig(num_blocks=2, dropout=0.5)).train()
    x = torch.randn(64, 8)
    assert torch.equal(zero(x), base(x))  # the blocks are zero, so dropout on the base's input would be visible
    layer = DiabloLinear(base, "default", DiabloConfig(num_blocks=2, dropout=0.5, init_weights=False))
    blocks = layer.diablo_blocks["default"]
    undropped = base(x) + x @ torch.block_diag(*blocks)
    torch.testing.assert_close(layer.eval()(x), undropped)
    identity = DiabloLinear(nn.Linear(8, 8), "default", DiabloConfig(num_blocks=1, dropout=0.5))
    identity.diablo_blocks["default"].data.copy_(torch.eye(8))
    torch.manual_seed(3)
    dropped = identity.train()(x) - identity.base_layer(x)
    kept = dropped.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * x[kept])
    torch.manual_seed(3)
    torch.testing.assert_close(layer.train()(x), base(x) + dropped @ torch.block_diag(*blocks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [nn.Linear(8, 4), Conv1D(4, 8)], ids=["fused", "on top of the base layer's output"])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(base: nn.Module) -> None:
    layer = DiabloLinear(base.double(), "default", DiabloConfig(num_blocks=2, dropout=0.5, init_weights=False)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, blocks: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask at every evaluation
        return torch.func.functional_call(layer.train(), {"diablo_blocks.default": blocks}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.diablo_blocks["default"]))


def test_merging_touches_the_blocks_own_entries_only() -> None:
    base = nn.Linear(8, 4, bias=False)
    base.weight.data.fill_(-0.0)  # adding +0 would flip the sign
    layer = DiabloLinear(base, "default", DiabloConfig(num_blocks=2, init_weights=False))
    layer.merge()
    outside = layer.get_delta_weight("default") == 0
    assert outside.sum() == 16
    assert torch.signbit(base.weight[outside]).all()
    assert torch.equal(base.weight, layer.get_delta_weight("default"))


def test_safe_merge_refuses_values_that_are_not_finite_and_leaves_the_weight() -> None:
    layer = DiabloLinear(nn.Linear(8, 4), "default", DiabloConfig(num_blocks=2))
    layer.diablo_blocks["default"].data[0, 0, 0] = torch.nan
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_merging_into_a_weight_it_cannot_change_is_refused() -> None:
    """Such a weight would accept the sum without an error and give a wrong layer."""

    class Quantised(Tensor):
        pass

    base = nn.Linear(4, 4, bias=False)
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Quantised), requires_grad=False)
    layer = DiabloLinear(base, "default", DiabloConfig(num_blocks=2, init_weights=False))
    assert layer(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(TypeError, match=r"Linear has a weight of type Quantised, torch.float32, .*load or dequantise"):
        layer.merge()


class HQQLinear(nn.Module):
    """A toy quantised layer under a name that PEFT knows: weights in steps of 1/64, no `weight` attribute."""

    W_q: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("W_q", (linear.weight.detach() * 64).round().to(torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.W_q / 64).T


class StepBackend(QuantizationBackend):
    supports_merge = True
    layer_type = "linear"
    backend_name = "steps of 1/64"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        assert isinstance(base_layer.W_q, Tensor)
        return base_layer.W_q / 64

    def set_base_weight(self, peft_layer: DiabloLinear, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().W_q = (weight_data * 64).round().to(torch.int16)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    def resolve(base_layer: nn.Module, **_: object) -> QuantizationBackend | None:
        return StepBackend() if isinstance(base_layer, HQQLinear) else None

    monkeypatch.setattr("diablo.blocks.layer.resolve_quantization_backend", resolve)
    monkeypatch.setattr("diablo.blocks.model.resolve_quantization_backend", resolve)
    torch.manual_seed(0)
    return nn.Sequential(HQQLinear(nn.Linear(8, 4)))


def test_a_quantised_base_trains_merges_and_unmerges_to_its_rounding(quantised: nn.Sequential) -> None:
    x = torch.randn(5, 8)
    frozen = quantised(x)
    config = DiabloConfig(num_blocks=2, target_modules=["0"], init_weights=False)
    model = get_peft_model(quantised, config)  # pyright: ignore[reportArgumentType]
    layer = quantised[0]
    assert isinstance(layer, DiabloLinear)
    adapted = model(x)
    torch.testing.assert_close(adapted, frozen + x @ layer.get_delta_weight("default").T)
    adapted.square().sum().backward()
    assert layer.diablo_blocks["default"].grad is not None
    step = x.abs().sum(dim=1).max().item() / 64
    layer.merge(safe_merge=True)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=step)
    layer.unmerge()
    assert not layer.merged
    with model.disable_adapter():
        torch.testing.assert_close(model(x), frozen, rtol=0, atol=step)
    assert isinstance(model.unload()[0], HQQLinear)  # pyright: ignore


def test_safe_merge_checks_a_quantised_base_too(quantised: nn.Sequential) -> None:
    layer = DiabloLinear(quantised[0], "default", DiabloConfig(num_blocks=2))
    layer.diablo_blocks["default"].data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_merging_into_a_forward_only_quantised_base_is_refused(quantised: nn.Sequential) -> None:
    layer = DiabloLinear(quantised[0], "default", DiabloConfig(num_blocks=2))
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    assert layer(torch.randn(2, 8)).shape == (2, 4)
    with pytest.raises(TypeError, match="not supported for gptq layers"):
        layer.merge()
    assert not layer.merged


def test_a_bitsandbytes_4_bit_base_trains_and_merges() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    base.load_state_dict(nn.Linear(64, 64, bias=False).state_dict())
    base = base.to("cpu")
    layer = DiabloLinear(base, "default", DiabloConfig(num_blocks=4, init_weights=False))
    x = torch.randn(5, 64)
    adapted = layer(x)
    adapted.square().sum().backward()
    assert layer.diablo_blocks["default"].grad is not None
    layer.merge()
    assert (layer(x) - adapted).norm() < 0.15 * adapted.norm()  # merging requantises the sum


class Transposing(nn.Linear):
    """A base layer whose output is not contiguous."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pattern", ["diagonal", "random_block", "random_entry"])
def test_the_update_reaches_an_output_of_any_strides(pattern: str, grad: bool) -> None:
    """W x + D x, also where adding to the output's rows would add to a copy of them."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(OrderedDict(first=nn.Linear(8, 12), second=Transposing(12, 12))).double()
    config = SparseConfig(pattern=pattern, density="1/3", target_modules=["second"], mode="adapter", init_weights=False)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=grad)
    before = model(x)
    assert not before.is_contiguous()
    adapted: Any = get_peft_model(model, config)
    layer = adapted.base_model.model.second
    expected = before + model.first(x) @ layer.get_delta_weight("default").T
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(adapted(x), expected)
        torch.testing.assert_close(adapted(x.transpose(0, 1)), expected.transpose(0, 1))


@pytest.mark.parametrize("where", ["layer", "part of it", "everywhere"])
def test_a_hook_sees_what_the_base_layer_gives(where: str) -> None:
    """Regression: the update was added in place to the tensor that the hook had kept."""
    base = nn.Sequential(OrderedDict(inner=nn.Linear(8, 4)))
    layer: Any = Wrapped(base)
    adapted = DiabloLinear(layer, "default", DiabloConfig(num_blocks=2, mode="adapter", init_weights=False))
    x, kept = torch.randn(3, 8, requires_grad=True), []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output)

    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(keep)
    else:
        handle = layer.get_submodule("" if where == "layer" else "inner").register_forward_hook(keep)
    try:
        result = adapted(x)
    finally:
        handle.remove()
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(kept[0], expected)
    torch.testing.assert_close(result, expected + x @ adapted.get_delta_weight("default").T)


class Wrapped(nn.Linear):
    """A linear layer that returns the output of a submodule."""

    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__(8, 4)
        self.inner = parts.inner
        self.weight, self.bias = parts.inner.weight, parts.inner.bias  # pyright: ignore

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(input)  # pyright: ignore[reportCallIssue]
