"""Mode "in_place" gives the same numbers as mode "adapter", for every optimizer and training setup."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import diablo
from diablo import DiabloConfig, DiabloLinear
from diablo.blocks.products import delta_weight
from tests.diablo.blocks.test_diablo_tuner import adapted, attach, tiny_llama, tokens, train

Mode = Literal["auto", "adapter", "in_place"]


def layer_of(mode: Mode, base: nn.Module, num_blocks: int = 2, **settings: Any) -> DiabloLinear:
    torch.manual_seed(5)
    config = DiabloConfig(num_blocks=num_blocks, mode=mode, init_weights=False, **settings)
    return DiabloLinear(copy.deepcopy(base), "default", config)


def blocks_of(layer: DiabloLinear) -> nn.Parameter:
    return layer.diablo_blocks["default"]


def weight_of(layer: DiabloLinear) -> Tensor:
    assert isinstance(layer.base_layer, nn.Linear)
    return layer.base_layer.weight


def bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def rounded_sum(layer: DiabloLinear, original: Tensor) -> Tensor:
    """Return round(W0 + D) by definition, from a dense D."""
    return (original + layer.get_delta_weight("default")).to(original.dtype)


# Equality of the modes


@given(
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    num_blocks=st.integers(1, 8),
    leading=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
)
def test_both_modes_equal_the_dense_layer_and_its_gradients(
    in_features: int, out_features: int, num_blocks: int, leading: list[int], bias: bool
) -> None:
    base = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    x = torch.randn(*leading, in_features, dtype=torch.float64)
    for mode in ("adapter", "in_place"):
        layer = layer_of(mode, base, num_blocks, allow_uneven=True)
        dense = (base.weight + layer.get_delta_weight("default")).detach().requires_grad_()
        x_dense, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = nn.functional.linear(x_dense, dense, base.bias)
        upstream = torch.randn_like(expected)
        expected.backward(upstream)
        result = layer(x_ours)
        result.backward(upstream)
        close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(result, expected, **close)
        torch.testing.assert_close(x_ours.grad, x_dense.grad, **close)
        gradient, full = blocks_of(layer).grad, dense.grad
        assert gradient is not None
        assert full is not None
        inside = delta_weight(torch.ones_like(gradient), in_features, out_features)
        torch.testing.assert_close(delta_weight(gradient, in_features, out_features), full * inside, **close)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_the_gradient_is_the_diagonal_of_the_full_one_within_rounding(
    mode: Mode, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 96).to(dtype)
    layer = layer_of(mode, base, 4)
    full = base.double().weight
    layer.diablo_blocks["default"].data = blocks_of(layer).data.float()
    x = torch.randn(128, 64).to(dtype)
    upstream = torch.randn(128, 96).to(dtype)
    layer(x).backward(upstream)
    nn.functional.linear(x.double(), full).backward(upstream.double())
    gradient = blocks_of(layer).grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert full.grad is not None
    for i in range(4):
        block = full.grad[i * 24 : (i + 1) * 24, i * 16 : (i + 1) * 16].T
        assert (gradient[i] - block).norm() <= tolerance * block.norm()


def test_fifty_steps_in_place_equal_fifty_beside_the_weight() -> None:
    """Including weight decay, which acts on D and not on the weight in both modes."""
    models = [attach(tiny_llama(torch.float64), mode=mode) for mode in ("adapter", "in_place")]
    for model in models:
        for layer in adapted(model).values():
            layer.double()
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        history = []
        for step in range(50):
            loss = model(input_ids=tokens(2, 5 + step % 3), labels=tokens(2, 5 + step % 3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    assert losses[0][-1] < 0.5 * losses[0][0]
    for name, layer in adapted(models[0]).items():
        other = adapted(models[1])[name]
        assert (layer.forward_mode["default"], other.forward_mode["default"]) == ("adapter", "in_place")
        torch.testing.assert_close(blocks_of(layer), blocks_of(other), rtol=0, atol=1e-9)


# Optimizers


def eight_bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW plain": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "AdamW 8-bit": eight_bit,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_weight_holds_the_rounded_sum_after_every_step(optimizer: str, dtype: torch.dtype) -> None:
    base = nn.Linear(64, 64, dtype=dtype)
    layer = layer_of("in_place", base, 2)
    layer.diablo_blocks["default"] = nn.Parameter(torch.zeros(2, 32, 32))
    layer.refresh()
    adam = OPTIMIZERS[optimizer]([blocks_of(layer)])
    for _ in range(4):
        layer(torch.randn(8, 64, dtype=dtype)).square().sum().backward()
        adam.step()
        adam.zero_grad()
        assert torch.equal(weight_of(layer), rounded_sum(layer, base.weight))
    off_diagonal = torch.block_diag(*torch.ones(2, 32, 32)).T == 0
    assert bits(weight_of(layer)[off_diagonal]) == bits(base.weight[off_diagonal])
    assert not torch.equal(weight_of(layer), base.weight)
    layer.merge()
    layer.unmerge()
    assert bits(weight_of(layer)) == bits(base.weight)


def test_a_step_of_another_optimizer_writes_nothing() -> None:
    layer, other = layer_of("in_place", nn.Linear(8, 8)), nn.Linear(2, 2)
    version = weight_of(layer)._version
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert weight_of(layer)._version == version


@pytest.mark.parametrize(("learning_rate", "bound"), [(5e-4, 0.01), (1e-4, None), (2e-5, None)])
def test_updates_below_the_spacing_of_bf16_are_not_lost(learning_rate: float, bound: float | None) -> None:
    """1,401 Adam steps, the number in the authors' GSM8K recipe, on a bf16 weight of LLaMA's size.

    The comparison uses bf16 blocks with bf16 moments, as in that recipe.
    """
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        base.weight.copy_(0.02 * torch.randn(64, 64))
    layer = layer_of("in_place", base, 1)
    layer.diablo_blocks["default"] = nn.Parameter(torch.zeros(1, 64, 64))
    layer.refresh()
    exact = nn.Parameter(torch.zeros(1, 64, 64, dtype=torch.float64))
    lossy = nn.Parameter(torch.zeros(1, 64, 64, dtype=torch.bfloat16))
    trained = (blocks_of(layer), exact, lossy)
    optimizers = [torch.optim.AdamW([parameter], lr=learning_rate, weight_decay=0.0) for parameter in trained]
    for _ in range(1401):
        gradient = torch.randn(1, 64, 64)
        for parameter, optimizer in zip(trained, optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    change = (weight_of(layer).double() - base.weight.double()).T
    error = ((change - exact[0]).norm() / exact.norm()).item()
    in_bf16 = ((lossy.double() - exact).norm() / exact.norm()).item()
    print(f"lr {learning_rate:g}: in place {error:.2%}, blocks and moments in bf16 {in_bf16:.2%}")
    if bound is not None:
        assert error <= bound
    assert error < in_bf16


# Training setups


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain, checkpointed = (attach(tiny_llama(), mode="in_place", init_weights=False).train() for _ in range(2))
    for left, right in zip(adapted(plain).values(), adapted(checkpointed).values(), strict=True):
        blocks_of(right).data.copy_(blocks_of(left))
    diablo.refresh(checkpointed)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, layer in adapted(plain).items():
        gradient = blocks_of(adapted(checkpointed)[name]).grad
        expected = blocks_of(layer).grad
        assert gradient is not None
        assert expected is not None
        assert torch.equal(gradient, expected)


def test_accumulated_gradients_equal_those_of_the_whole_batch() -> None:
    whole, parts = (attach(tiny_llama(torch.float64), mode="in_place") for _ in range(2))
    whole(input_ids=tokens(4), labels=tokens(4)).loss.backward()
    for row in tokens(4):
        (parts(input_ids=row[None], labels=row[None]).loss / 4).backward()
    for left, right in zip(adapted(whole).values(), adapted(parts).values(), strict=True):
        torch.testing.assert_close(blocks_of(left).grad, blocks_of(right).grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_autocast_computes_in_bf16_and_keeps_float32_gradients(mode: Mode) -> None:
    layer = layer_of(mode, nn.Linear(64, 64), 2)
    x = torch.randn(4, 64, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
        assert result.dtype == torch.bfloat16
        assert (result.float() - exact).norm() < 0.02 * exact.norm()
        result.float().square().sum().backward()  # backward pass inside autocast, as in some training loops
    gradient = blocks_of(layer).grad
    assert gradient is not None
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("mode", ["adapter", "in_place"])
def test_compiles_without_a_graph_break_and_sees_every_step(mode: Mode) -> None:
    base = nn.Linear(32, 64)
    layers = [layer_of(mode, base, 2) for _ in range(2)]
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD([blocks_of(layer)], lr=0.1) for layer in layers]
    x = torch.randn(3, 5, 32)
    for _ in range(3):
        outputs = [layers[0](x), compiled(x)]
        torch.testing.assert_close(outputs[0], outputs[1])
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(blocks_of(layers[0]), blocks_of(layers[1]))


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient() -> None:
    """Preference training (DPO) runs the base model, with adapters disabled, before the backward pass."""
    model = attach(tiny_llama(), mode="in_place", init_weights=False)
    frozen = tiny_llama()(tokens()).logits
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = {name: blocks_of(layer).grad for name, layer in adapted(model).items()}
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(tokens()).logits, frozen)
    loss.backward()
    for name, layer in adapted(model).items():
        assert torch.equal(blocks_of(layer).grad, expected[name])  # pyright: ignore[reportArgumentType]


def test_a_backward_pass_through_other_weights_is_refused() -> None:
    layer = layer_of("in_place", nn.Linear(8, 8))
    optimizer = torch.optim.AdamW([blocks_of(layer)], fused=True)
    stale = layer(torch.randn(2, 8, requires_grad=True)).sum()
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"have changed since the forward pass.* mode='adapter'"):
        stale.backward()
    stale = layer(torch.randn(2, 8, requires_grad=True)).sum()
    layer.enable_adapters(False)
    with pytest.raises(RuntimeError, match="have changed since the forward pass"):
        stale.backward()


def test_evaluation_computes_with_the_training_weights() -> None:
    model = attach(tiny_llama(torch.bfloat16), mode="in_place")
    train(model)
    trained = model(tokens()).logits
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, trained)
    model.merge_adapter()
    assert torch.equal(model(tokens()).logits, trained)
    assert torch.equal(model.merge_and_unload()(tokens()).logits, trained)


# Memory


@pytest.mark.parametrize("settings", [{"mode": "adapter", "dropout": 0.1}, {"mode": "adapter"}, {"mode": "in_place"}])
def test_layers_with_one_input_keep_it_once_and_nothing_else(settings: dict) -> None:
    """No copy made by dropout or a cast is kept: q, k and v share one x, also under autocast."""
    layers = [layer_of(base=nn.Linear(64, 64), **settings) for _ in range(3)]
    parameters = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    x = torch.randn(4, 64, requires_grad=True)
    for autocast in (False, True):
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for layer in layers:
                layer.train()(x)
        activations = [t for pointer, t in kept.items() if pointer not in parameters and t.shape != (64, 64)]
        assert [tensor.shape for tensor in activations] == [x.shape]
