"""GPU code against references in float64: run by `python -m experiments.gpu`, or `pytest -m cuda`.

`DIABLO_TEST_DEVICE=cpu` runs the same tests without a GPU, which checks the tests themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from diablo import DiabloConfig, DiabloLinear

pytestmark = pytest.mark.cuda
DEVICE = os.environ.get("DIABLO_TEST_DEVICE", "cuda")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NUM_BLOCKS = 16
Mode = Literal["adapter", "in_place"]
ROOT = Path(__file__).resolve().parents[3]

MODES = pytest.mark.parametrize("mode", ["adapter", "in_place"])
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
}


@pytest.fixture(autouse=True, scope="module")
def device() -> str:
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return DEVICE


def llama(dtype: torch.dtype = torch.float32) -> Any:
    """Return three layers with grouped-query attention, whose weights are exact in bf16 for every dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.05,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).to(device=DEVICE, dtype=dtype)


def attach(base: Any, mode: Mode, **settings: Any) -> Any:
    from peft import get_peft_model

    config: Any = DiabloConfig(num_blocks=NUM_BLOCKS, target_modules=TARGETS, mode=mode, **settings)
    return get_peft_model(base, config).train()


def layers_of(model: nn.Module) -> dict[str, DiabloLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DiabloLinear)}


def weight_of(layer: DiabloLinear) -> Tensor:
    assert isinstance(layer.base_layer, nn.Linear)
    return layer.base_layer.weight


def tokens(rows: int = 4, length: int = 64, seed: int = 1) -> Tensor:
    return torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_of(model: Any, autocast: bool = False, seed: int = 1) -> Tensor:
    ids = tokens(seed=seed)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=autocast):
        return model(input_ids=ids, labels=ids).loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: layer.diablo_blocks["default"].grad for name, layer in layers_of(model).items()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.double() for name, gradient in found.items() if gradient is not None}


def diagonal_of_the_full_gradient() -> dict[str, Tensor]:
    """Return the diagonal blocks of the dense weight's gradient in float64 (the paper's identity)."""
    full = llama(torch.float64).train()
    loss_of(full).backward()
    found: dict[str, Tensor] = {}
    for name, module in full.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            rows = module.weight.grad.chunk(NUM_BLOCKS)  # (out, in)
            found[f"base_model.model.{name}"] = torch.stack(
                [row.chunk(NUM_BLOCKS, dim=1)[i].T for i, row in enumerate(rows)]
            )
    return found


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the norm of the difference over all tensors, relative to that of the right-hand ones."""
    assert left.keys() == right.keys()
    squares = [(left[name].detach().double() - right[name].detach().double()).square().sum().item() for name in left]
    return (sum(squares) / sum(tensor.detach().double().square().sum().item() for tensor in right.values())) ** 0.5


@MODES
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 1e-5),
        (torch.float32, True, 0.05),
        (torch.bfloat16, False, 0.05),
        (torch.bfloat16, True, 0.05),
    ],
)
def test_the_gradient_is_the_diagonal_of_the_full_one(
    mode: Mode, dtype: torch.dtype, autocast: bool, tolerance: float, checkpointing: bool
) -> None:
    model = attach(llama(dtype), mode)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(model, autocast).backward()
    assert all(layer.forward_mode["default"] == mode for layer in layers_of(model).values())
    assert distance(gradients(model), diagonal_of_the_full_gradient()) <= tolerance


@MODES
@pytest.mark.parametrize("side", [64, 172])  # 4096 / 64 and 11008 / 64
def test_a_bf16_layer_s_gradient_is_summed_in_float32(mode: Mode, side: int) -> None:
    """The products are exact in float32, so that only the order of summation differs; bf16 rounding is 4e-3."""
    torch.manual_seed(0)
    base = nn.Linear(64 * 4, side * 4, bias=False).to(DEVICE, torch.bfloat16)
    layer = DiabloLinear(base, "default", DiabloConfig(num_blocks=4, mode=mode))
    layer.diablo_blocks["default"].data = layer.diablo_blocks["default"].data.float()  # as get_peft_model makes them
    x, upstream = (torch.randn(2048, size, device=DEVICE).bfloat16() for size in (64 * 4, side * 4))
    layer(x).backward(upstream)
    gradient = layer.diablo_blocks["default"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    expected = torch.stack(
        [a.T @ b for a, b in zip(x.double().chunk(4, dim=1), upstream.double().chunk(4, dim=1), strict=True)]
    )
    assert distance({"D": gradient}, {"D": expected}) <= 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sides", [(64, 64), (64, 172), (172, 64), (20, 24)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_bf16_layer_with_a_branch_equals_a_dense_one(dropout: float, sides: tuple[int, int], bias: bool) -> None:
    """On a GPU, odd sides are multiplied two at a time, and kernels make the mask of dropout."""
    torch.manual_seed(0)
    (d_in, d_out), n, tokens = sides, 4, 300
    base = nn.Linear(n * d_in, n * d_out, bias=bias).to(DEVICE, torch.bfloat16)
    config = DiabloConfig(num_blocks=n, mode="adapter", dropout=dropout, init_weights=False)
    layer = DiabloLinear(base, "default", config).train()
    blocks = layer.diablo_blocks["default"]
    blocks.data = blocks.data.float()
    x = torch.randn(tokens, n * d_in, device=DEVICE).bfloat16().requires_grad_()
    upstream = torch.randn(tokens, n * d_out, device=DEVICE).bfloat16()

    # With W = 0 and D_i = 1, the gradient of x under ones is the mask, summed over the columns of a block.
    mask = torch.ones(tokens, n * d_in, device=DEVICE, dtype=torch.float64)
    if dropout:
        probe = DiabloLinear(nn.Linear(n * d_in, n * d_out, bias=False).to(DEVICE, torch.bfloat16), "default", config)
        probe.train()
        weight_of(probe).data.zero_()
        probe.diablo_blocks["default"].data = torch.ones(n, d_in, d_out, device=DEVICE)
        seen = torch.zeros(tokens, n * d_in, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        torch.manual_seed(1)
        probe(seen).backward(torch.ones(tokens, n * d_out, device=DEVICE, dtype=torch.bfloat16))
        assert seen.grad is not None
        mask = (seen.grad != 0).double() / (1 - dropout)
        assert mask.count_nonzero() / mask.numel() == pytest.approx(1 - dropout, abs=0.02)
    torch.manual_seed(1)
    y = layer(x)
    y.backward(upstream)
    assert x.grad is not None
    assert blocks.grad is not None

    weight, dense = weight_of(layer).detach().double(), torch.block_diag(*blocks.detach().double())
    rows, out = x.detach().double(), upstream.double()
    expected = rows @ weight.T + (mask * rows) @ dense + (0 if base.bias is None else base.bias.detach().double())
    full = ((mask * rows).T @ out).view(n, d_in, n, d_out).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    assert distance({"y": y}, {"y": expected}) <= 6e-3
    assert distance({"dX": x.grad}, {"dX": out @ weight + mask * (out @ dense.T)}) <= 6e-3
    assert distance({"dD": blocks.grad}, {"dD": full}) <= (3e-3 if dropout else 1e-5)


def test_dropout_repeats_bit_for_bit() -> None:
    base = nn.Linear(4 * 64, 4 * 172, bias=False).to(DEVICE, torch.bfloat16)
    config = DiabloConfig(num_blocks=4, mode="adapter", dropout=0.25, init_weights=False)
    layer = DiabloLinear(base, "default", config).train()
    blocks = layer.diablo_blocks["default"]
    x = torch.randn(3000, 4 * 64, device=DEVICE).bfloat16().requires_grad_()
    found: list[list[Tensor]] = []
    for seed in (3, 3, 4):
        x.grad = blocks.grad = None
        torch.manual_seed(seed)
        y = layer(x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        assert blocks.grad is not None
        found.append([y, x.grad, blocks.grad])
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))


def train(model: Any, optimizer: str, steps: int = 30, autocast: bool = False) -> list[float]:
    losses, blocks = [], [layer.diablo_blocks["default"] for layer in layers_of(model).values()]
    chosen = OPTIMIZERS[optimizer](blocks)
    for step in range(steps):
        loss = loss_of(model, autocast, seed=step % 3)
        loss.backward()
        chosen.step()
        chosen.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_thirty_steps_in_place_equal_thirty_beside_the_weight(optimizer: str) -> None:
    beside, inside = attach(llama(torch.float64), "adapter"), attach(llama(torch.float64), "in_place")
    for layer in (*layers_of(beside).values(), *layers_of(inside).values()):
        layer.double()
    losses = train(beside, optimizer), train(inside, optimizer)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # transformers computes the loss in float32
    assert losses[0][-1] < losses[0][0] - 0.2
    blocks = [{name: layer.diablo_blocks["default"] for name, layer in layers_of(m).items()} for m in (beside, inside)]
    assert distance(*blocks) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_weight_holds_the_rounded_sum_and_comes_back_bit_for_bit(optimizer: str, dtype: torch.dtype) -> None:
    model = attach(llama(dtype), "in_place")
    before = {name: weight_of(layer).detach().clone() for name, layer in layers_of(model).items()}
    losses = train(model, optimizer, steps=10, autocast=dtype == torch.bfloat16)
    assert losses[-1] < losses[0]
    for name, layer in layers_of(model).items():
        assert layer.diablo_blocks["default"].dtype == torch.float32
        rounded = (before[name].float() + layer.get_delta_weight("default")).to(dtype)
        assert torch.equal(weight_of(layer), rounded), name
        assert not torch.equal(weight_of(layer), before[name]), name
    with torch.no_grad():
        unmerged = model.eval()(input_ids=tokens()).logits
        model.merge_adapter()
        assert torch.equal(model(input_ids=tokens()).logits, unmerged)
        model.unmerge_adapter()
        with model.disable_adapter():
            for name, layer in layers_of(model).items():
                assert torch.equal(weight_of(layer), before[name]), name
        assert torch.equal(model(input_ids=tokens()).logits, unmerged)


def test_merging_an_adapter_changes_outputs_by_rounding() -> None:
    model = attach(llama(), "adapter")
    train(model, "AdamW fused", steps=5)
    with torch.no_grad():
        unmerged = model.eval()(input_ids=tokens()).logits
        merged = model.merge_and_unload()(input_ids=tokens()).logits
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=1e-4)


@MODES
def test_compiled_equals_eager(mode: Mode) -> None:
    """With inductor on a GPU; elsewhere the captured graph runs uncompiled."""
    backend = "inductor" if DEVICE.startswith("cuda") else "aot_eager"
    eager, compiled = attach(llama(), mode), attach(llama(), mode)
    torch.compiler.reset()
    run: Any = torch.compile(compiled, backend=backend)
    for model in (eager, run):
        loss_of(model).backward()
    assert distance(gradients(compiled), gradients(eager)) <= 1e-4


def test_dropout_draws_from_the_state_that_a_checkpoint_keeps() -> None:
    from experiments.train.checkpoint import random_state, restore_random_state

    model = attach(llama(), "adapter", dropout=0.5, init_weights=False)
    loss_of(model)
    kept = random_state()
    first = loss_of(model)
    assert not torch.equal(loss_of(model), first)
    restore_random_state(*kept)
    assert torch.equal(loss_of(model), first)


def test_a_quantised_layer_computes_with_its_dequantised_weight() -> None:
    from diablo.quantize import QuantizedLinear, round_to_nearest

    torch.manual_seed(0)
    dense = nn.Linear(256, 128, bias=False)
    layer = QuantizedLinear.from_weight(round_to_nearest(dense.weight.detach(), 4, 64)).to(DEVICE)
    x = torch.randn(32, 256, device=DEVICE)
    assert torch.equal(layer.weight, layer.weight)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, atol=1e-5, rtol=1e-5)
    assert (layer.dequantize().cpu() - dense.weight).abs().max() < 0.02


def test_a_new_process_reads_its_peak_memory() -> None:
    """Regression: the reset was called before CUDA was initialised, which stopped every run on a GPU."""
    code = (
        f"from experiments.runs.environment import peak_memory, reset_peak_memory; device = {DEVICE!r}\n"
        "reset_peak_memory(device)\nbefore = peak_memory(device)\n"
        "import torch; held = torch.ones(2**26, device=device)\nassert peak_memory(device) - before >= 2**27\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_allocation_that_cannot_succeed_is_known_as_out_of_memory() -> None:
    from experiments.errors import out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**47, dtype=torch.uint8, device=DEVICE)
    where = "the GPU" if DEVICE.startswith("cuda") else "the machine"
    line = out_of_memory(caught.value)
    assert line is not None
    assert line.startswith(f"{where} is out of memory (")
