"""The Triton kernels of the branch with dropout, interpreted on the CPU; on a GPU see tests/experiments/gpu."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from diablo import DiabloConfig, DiabloLinear
from diablo.blocks import branch
from diablo.blocks.branch import Dropout

P, SEED = 0.3, 2**61 + 12345
SHAPES = pytest.mark.parametrize("shape", [(3, 16, 16), (3, 20, 43), (2, 172, 64), (2, 64, 172), (1, 300, 17)])


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, triton does not interpret kernels: tests/experiments/gpu/test_cuda.py runs them there")
    from diablo.blocks import kernels

    return kernels


def mask_of(tokens: int, features: int, probability: float = P, seed: int = SEED) -> Tensor:
    """Return dropout(ones), computed from the hash's definition in Python's integers modulo 2³²."""
    h = torch.arange(tokens * features).view(tokens, features) ^ (seed % 2**31)
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= seed >> 31
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    h ^= h >> 16
    return ((h >> 1) >= round(probability * 2**31)).double() / (1 - probability)


@SHAPES
@pytest.mark.parametrize("tokens", [1, 70, 130])
def test_products_and_gradient_equal_dense_ones_with_the_same_mask(
    kernels: ModuleType, shape: tuple[int, int, int], tokens: int
) -> None:
    n, d_in, d_out = shape
    torch.manual_seed(0)
    x, grad_y, blocks = torch.randn(tokens, n * d_in), torch.randn(tokens, n * d_out), torch.randn(shape)
    mask, dense = mask_of(tokens, n * d_in), torch.block_diag(*blocks.double())
    found = kernels.product(x, blocks, P, SEED)
    torch.testing.assert_close(found.double(), (mask * x) @ dense, rtol=1e-5, atol=1e-4)
    found = kernels.product(grad_y, blocks.transpose(1, 2), P, SEED, drops_input=False)
    torch.testing.assert_close(found.double(), mask * (grad_y.double() @ dense.T), rtol=1e-5, atol=1e-4)
    full = (mask * x).T @ grad_y.double()
    expected = torch.stack([full[i * d_in : (i + 1) * d_in, i * d_out : (i + 1) * d_out] for i in range(n)])
    torch.testing.assert_close(kernels.gradient(x, grad_y, shape, P, SEED).double(), expected, rtol=1e-5, atol=1e-4)


def test_operands_may_have_any_strides_and_no_rows(kernels: ModuleType) -> None:
    x, grad_y, blocks = torch.randn(40, 70).T[:, :32], torch.ones(1, 1).expand(70, 48), torch.randn(2, 16, 24)
    plain = kernels.product(x.contiguous(), blocks, P, SEED)
    assert torch.equal(kernels.product(x, blocks.transpose(1, 2).contiguous().transpose(1, 2), P, SEED), plain)
    gradient = kernels.gradient(x, grad_y, (2, 16, 24), P, SEED)
    assert torch.equal(gradient, kernels.gradient(x.contiguous(), grad_y.contiguous(), (2, 16, 24), P, SEED))
    assert kernels.product(x[:0], blocks, P, SEED).shape == (0, 48)
    assert torch.equal(kernels.gradient(x[:0], grad_y[:0], (2, 16, 24), P, SEED), torch.zeros(2, 16, 24))


def test_the_mask_looks_random() -> None:
    """Rate, neighbours and two seeds, each within five standard errors of independent draws."""
    torch.manual_seed(0)
    kept, other, again = (mask_of(1024, 1024, seed=branch.draw(P, torch.empty(0), True).seed).bool() for _ in range(3))

    def share(event: Tensor, expected: float) -> None:
        assert abs(event.double().mean() - expected) < 5 * (expected * (1 - expected) / event.numel()) ** 0.5

    share(kept, 1 - P)
    both = (1 - P) ** 2
    for one, two in (
        (kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept, other), (other, again), (kept, again),
        (kept[:, 1:], other[:, :-1]), (kept[:, ::2], kept[:, 1::2]),
    ):  # fmt: skip
        share(one & two, both)
    for axis in (0, 1):  # the counts of rows and columns vary as those of independent draws do
        counts = kept.double().sum(axis)
        assert counts.var() == pytest.approx(1024 * P * (1 - P), rel=0.25)


@pytest.mark.parametrize("kind", ["plain", "with bias", "computing its own product"])
def test_a_layer_with_them_equals_a_dense_one(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(branch, "draw", lambda *_: Dropout(P, SEED, in_kernels=True))
    monkeypatch.setattr(branch, "_kernels", lambda *_: kernels)
    torch.manual_seed(0)
    base = nn.Linear(40, 86, bias=kind == "with bias")
    if kind == "computing its own product":  # as quantised layers do
        base.register_forward_hook(lambda *_: None)
    layer = DiabloLinear(base, "default", DiabloConfig(num_blocks=2, dropout=P, init_weights=False)).train()
    blocks = layer.diablo_blocks["default"]
    x, upstream = torch.randn(3, 11, 40, requires_grad=True), torch.randn(3, 11, 86)
    y = layer(x)
    y.backward(upstream)
    mask, dense, weight = mask_of(33, 40), torch.block_diag(*blocks.detach().double()), base.weight.detach().double()
    rows, out = x.detach().double().view(33, 40), upstream.double().view(33, 86)
    expected = rows @ weight.T + (mask * rows) @ dense + (0 if base.bias is None else base.bias.detach().double())
    torch.testing.assert_close(y.detach().double().view(33, 86), expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert blocks.grad is not None
    torch.testing.assert_close(
        x.grad.double().view(33, 40), out @ weight + mask * (out @ dense.T), rtol=1e-5, atol=1e-5
    )
    full = (mask * rows).T @ out
    torch.testing.assert_close(
        blocks.grad.double(), torch.stack([full[:20, :43], full[20:, 43:]]), rtol=1e-5, atol=1e-5
    )
