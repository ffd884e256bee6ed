"""Layer inputs computed again in the backward pass: the same gradients, with the memory of the frozen model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diablo import BottleneckConfig, DiabloConfig, SparseConfig
from diablo.blocks.functional import add_blocks, block_linear
from diablo.blocks.recompute import recomputed_input
from experiments.speed.cases import peak_bytes

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}


def base_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    torch.manual_seed(0)
    extra = {"head_dim": 16, "num_key_value_heads": 2} if kind != "llama" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**LLAMA, **extra, **sizes})).to(dtype)


def adapted(base: Any, recompute: bool, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"target_modules": TARGETS, "init_weights": False, **options}
    config = options.pop("config", DiabloConfig)
    return get_peft_model(copy.deepcopy(base), config(recompute_inputs=recompute, **options)).train()


def loss_of(model: Any, rows: int = 3, length: int = 7, seed: int = 2) -> Tensor:
    tokens = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    torch.manual_seed(3)  # of dropout
    return model(inputs_embeds=embeddings, labels=tokens).loss


def gradients(
    model: Any, backward: Callable[[Any], None] = lambda model: loss_of(model).backward()
) -> dict[str, Tensor]:
    backward(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) == 10
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def saved_inputs(model: Any) -> int:
    """Count the block functions of one forward pass that keep their x."""
    kept = 0
    todo: list[Any] = [loss_of(model).grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        if node.name() in ("_BlockLinearBackward", "_AddBlocksBackward"):
            kept += node.saved_tensors[0] is not None
    return kept


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 4, "mode": "in_place"},
        {"num_blocks": 4, "mode": "adapter"},
        {"num_blocks": 4, "mode": "adapter", "dropout": 0.3},
        {"config": SparseConfig, "pattern": "random_block", "density": "1/4", "mode": "in_place"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values() if not isinstance(value, type)),
)
def test_gradients_are_the_same_bit_for_bit(kind: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    base = base_model(kind, dtype)
    kept, again = adapted(base, False, **options), adapted(base, True, **options)
    assert saved_inputs(kept) == 10
    assert saved_inputs(again) == 0
    assert_same(gradients(kept), gradients(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["in_place", "adapter"])
def test_peak_memory_is_the_frozen_model_s(dtype: torch.dtype, mode: str) -> None:
    base = base_model(dtype=dtype, hidden_size=128, intermediate_size=344, num_hidden_layers=4)

    def peak(model: Any) -> int:
        return peak_bytes(lambda: loss_of(model, 4, 128).backward(), list(model.parameters()), "cpu")

    floor = peak(copy.deepcopy(base).requires_grad_(False).train())
    kept = peak(adapted(base, False, num_blocks=8, mode=mode))
    again = peak(adapted(base, True, num_blocks=8, mode=mode))
    # Of each layer q, k and v's common input, up's and down's; the last layer's down has its own again at the peak.
    inputs = (4 * 128) * (4 * (128 + 128 + 344) - 344) * dtype.itemsize
    assert kept - again == pytest.approx(inputs, rel=0.05)
    assert again <= 1.05 * floor


def test_two_passes_before_their_backward_passes() -> None:
    base = base_model()

    def both(model: Any) -> None:
        losses = [loss_of(model, seed=seed) for seed in (4, 5)]
        for loss in losses:
            loss.backward()

    assert_same(*(gradients(adapted(base, recompute, num_blocks=4), both) for recompute in (False, True)))


def test_a_second_backward_pass_through_the_same_graph() -> None:
    base = base_model()

    def twice(model: Any) -> None:
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()

    assert_same(*(gradients(adapted(base, recompute, num_blocks=4), twice) for recompute in (False, True)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    base = base_model()

    def backward(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(model).backward()

    assert_same(gradients(adapted(base, False, num_blocks=4)), gradients(adapted(base, True, num_blocks=4), backward))


def test_offloaded_activations() -> None:
    base = base_model()

    def backward(model: Any) -> None:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model)
        loss.backward()

    assert_same(gradients(adapted(base, False, num_blocks=4)), gradients(adapted(base, True, num_blocks=4), backward))


def test_under_autocast() -> None:
    base = base_model()

    def backward(model: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()

    assert_same(*(gradients(adapted(base, recompute, num_blocks=4), backward) for recompute in (False, True)))


def test_several_adapters_side_by_side() -> None:
    base = base_model()

    def with_two(recompute: bool) -> Any:
        model = adapted(base, recompute, num_blocks=4, mode="adapter")
        config = DiabloConfig(num_blocks=8, target_modules=TARGETS, init_weights=False, recompute_inputs=not recompute)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        return model

    one, two = gradients(with_two(False)), gradients(with_two(True))
    assert one.keys() == two.keys()
    assert len(one) == 20
    assert all(torch.equal(one[name], two[name]) for name in one)


MADE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "product": (lambda a, b: a * b, True),
    "square": (lambda a, b: a * a, True),
    "cast": (lambda a, b: (a.double() * b.double()).float(), True),
    "frozen factor": (lambda a, b: b.detach() * (a * b), True),
    "frozen factor right": (lambda a, b: (a * b) * b.detach(), True),
    "number": (lambda a, b: 0.5 * (a * b) * 3, True),
    "broadcast": (lambda a, b: (a * b) * b.mean(-1, keepdim=True), True),
    "function": (lambda a, b: torch.tanh(a), False),  # autograd keeps x itself: keeping it costs nothing
    "leaf": (lambda a, b: a, False),
    "number times leaf": (lambda a, b: 2 * a, False),
    "sum": (lambda a, b: a + b, False),
    "part of a product": (lambda a, b: (a * b)[:-1], False),
    "changed in place": (lambda a, b: (a * b).add_(1), False),
}


@pytest.mark.parametrize(("make", "again"), MADE.values(), ids=MADE)
@pytest.mark.parametrize("in_place", [True, False])
def test_inputs_that_can_be_made_again(make: Callable[..., Tensor], again: bool, in_place: bool) -> None:
    torch.manual_seed(0)
    weight, frozen = torch.randn(8, 8), torch.randn(5, 8)
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        torch.manual_seed(1)
        a, b, blocks = (torch.randn(shape, requires_grad=True) for shape in ((5, 8), (5, 8), (2, 4, 4)))
        x = make(a, b)
        if in_place:
            y = block_linear(x, weight, None, blocks, recompute=recompute)
        else:
            y = add_blocks(x @ weight.T * 1, x, blocks, recompute=recompute)
        assert y.grad_fn is not None
        assert (y.grad_fn.saved_tensors[0] is None) == (recompute and again)  # pyright: ignore
        found.append(list(torch.autograd.grad(y, (a, b, blocks), frozen[: len(y)], allow_unused=True)))
    for one, other in zip(*found, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_an_input_that_is_computed_once_for_its_layers_and_then_dropped() -> None:
    a, b = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    x = a * b
    taken = [recomputed_input(x) for _ in range(3)]
    assert taken[0] is not None
    assert taken[0] is taken[1] is taken[2]
    values = [taken[0].take(x.grad_fn) for _ in range(3)]
    assert values[0] is values[1] is values[2]
    assert torch.equal(values[0], x)
    assert taken[0].value is None
    assert taken[0].take(x.grad_fn) is not values[0]  # a second backward pass


def test_nothing_is_counted_without_gradients() -> None:
    a, b = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    x = a * b
    with torch.no_grad():
        assert recomputed_input(x) is None


def test_a_changed_factor_is_an_error_as_for_autograd_itself() -> None:
    a, b, blocks = (torch.randn(shape, requires_grad=True) for shape in ((5, 8), (5, 8), (2, 4, 4)))
    gate = a * 2
    y = block_linear(gate * b, torch.randn(8, 8), None, blocks, recompute=True)
    gate.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_a_checkpointed_function_the_input_is_kept() -> None:
    a, b, blocks = (torch.randn(shape, requires_grad=True) for shape in ((5, 8), (5, 8), (2, 4, 4)))
    weight = torch.randn(8, 8)

    def layer(a: Tensor, b: Tensor) -> Tensor:
        return block_linear(a * b, weight, None, blocks, recompute=True)

    plain = torch.autograd.grad(layer(a, b).sum(), (a, b, blocks))
    again = torch.autograd.grad(checkpoint(layer, a, b, use_reentrant=False).sum(), (a, b, blocks))  # pyright: ignore
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.slow
def test_compiled() -> None:
    base = base_model(num_hidden_layers=1)

    def backward(model: Any) -> None:
        loss_of(torch.compile(model, backend="aot_eager")).backward()

    kept = gradients(adapted(base, False, num_blocks=4, mode="adapter"))
    again = gradients(adapted(base, True, num_blocks=4, mode="adapter"), backward)
    assert len(kept) == 5
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient)


@pytest.mark.parametrize("config", [DiabloConfig(), SparseConfig(), BottleneckConfig()])
def test_only_methods_that_train_blocks_have_the_option(config: Any) -> None:
    assert hasattr(config, "recompute_inputs") == isinstance(config, (DiabloConfig, SparseConfig))


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_real_weights(smollm2: Path, dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. " * 8
    tokens = tokenizer([text, text[::-1]], return_tensors="pt", truncation=True, max_length=128)["input_ids"]

    def backward(model: Any) -> None:
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=tokens).loss.backward()

    peaks: list[int] = []
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        model = get_peft_model(base, DiabloConfig(num_blocks=12, target_modules=TARGETS, recompute_inputs=recompute))
        model.train()
        peaks.append(peak_bytes(lambda model=model: backward(model), list(model.parameters()), "cpu"))
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        base = model.unload()
    floor = peak_bytes(lambda: backward(base.requires_grad_(False)), [], "cpu")
    assert len(found[0]) == 5 * 30
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())
    assert peaks[1] <= 1.05 * floor + sum(gradient.nbytes for gradient in found[1].values())
    assert peaks[0] > peaks[1]
