"""Sparse patterns of one layer: the chosen entries, which get the gradient of full fine-tuning."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from diablo import DiabloLinear, SparseConfig
from diablo.blocks import patterns
from diablo.blocks.patterns import BLOCK_PATTERNS, PATTERNS, draw, draw_distinct, generator_for, pattern_shape
from diablo.blocks.positions import Positions, delta_weight
from diablo.blocks.products import delta_weight as diagonal_weight
from diablo.methods import sparse

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def places_of(pattern: str, in_features: int, out_features: int, n: int, seed: int = 0, name: str = "q") -> Positions:
    shape = pattern_shape(pattern, in_features, out_features, Fraction(1, n))
    return draw(pattern, shape, in_features, out_features, generator_for(seed, name))


def mask_of(positions: Positions, in_features: int, out_features: int) -> Tensor:
    """Return how often each entry is chosen, `(in, out)` like the paper's W."""
    mask = torch.zeros(in_features, out_features, dtype=torch.int64)
    for inputs, outputs in zip(positions.inputs.tolist(), positions.outputs.tolist(), strict=True):
        for i in inputs:
            for j in outputs:
                mask[i, j] += 1
    return mask


def layer_of(pattern: str, base: nn.Linear, mode: Literal["adapter", "in_place"], n: int, **more: Any) -> DiabloLinear:
    positions = places_of(pattern, base.in_features, base.out_features, n)
    config = SparseConfig(pattern=pattern, density=f"1/{n}", mode=mode, **more)
    return DiabloLinear(copy.deepcopy(base), "default", config, positions=positions)


# Choice of entries


@given(
    pattern=st.sampled_from(PATTERNS),
    n=st.integers(1, 6),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_pattern_chooses_its_share_once_each_and_has_its_form(
    pattern: str, n: int, d_in: int, d_out: int, seed: int
) -> None:
    in_features, out_features = n * d_in, n * d_out
    positions = places_of(pattern, in_features, out_features, n, seed)
    mask = mask_of(positions, in_features, out_features)
    assert mask.max() == 1
    assert mask.sum() * n == in_features * out_features
    assert positions.shape == pattern_shape(pattern, in_features, out_features, Fraction(1, n))
    assert torch.equal(positions.inputs, positions.inputs.sort(1).values)
    assert torch.equal(positions.outputs, positions.outputs.sort(1).values)

    cells = mask.view(n, d_in, n, d_out).sum((1, 3)) // (d_in * d_out)  # 1 where a whole block is chosen
    if pattern == "random_row":
        assert sorted(mask.sum(1).tolist()) == [0] * (in_features - d_in) + [out_features] * d_in
    elif pattern == "random_column":
        assert sorted(mask.sum(0).tolist()) == [0] * (out_features - d_out) + [in_features] * d_out
    elif pattern == "random_block":
        assert cells.sum() == n
    elif pattern == "permuted_block":
        assert cells.sum(0).tolist() == cells.sum(1).tolist() == [1] * n
    elif pattern == "diagonal":
        blocks = torch.ones(n, d_in, d_out, dtype=torch.int64)
        assert torch.equal(mask, diagonal_weight(blocks, in_features, out_features).T)
    elif pattern == "shuffled_diagonal":  # every row lies in one column of blocks, and each of these has d_in rows
        rows = mask.view(in_features, n, d_out).sum(2) // d_out
        assert rows.sum(1).tolist() == [1] * in_features
        assert rows.sum(0).tolist() == [d_in] * n
    elif pattern == "banded":
        for i, line in enumerate(mask):
            chosen = line.nonzero().flatten()
            assert chosen.tolist() == list(range(int(chosen[0]), int(chosen[0]) + d_out))
            diagonal = (i + 0.5) / in_features * out_features  # of this row, in columns
            reach = min(max(diagonal, d_out / 2), out_features - d_out / 2)  # moved to lie inside
            assert abs(chosen.double().mean() + 0.5 - reach) <= 1


def test_a_dense_update_holds_every_block_at_its_place() -> None:
    positions = Positions(torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1], [0]]))  # columns 1 and 0 of a 4 × 2 matrix
    blocks = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert delta_weight(blocks, positions, 4, 2).tolist() == [[0, 3, 0, 4], [1, 0, 2, 0]]


def test_numbers_are_drawn_alike() -> None:
    """2000 draws of 2 out of 10: each number occurs 400 times on average, with a standard deviation of 18."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_distinct(10, 2, generator) for _ in range(2000)])  # few of many
    assert ((drawn.bincount(minlength=10) - 400).abs() < 5 * 18).all()
    drawn = torch.cat([draw_distinct(10, 5, generator) for _ in range(800)])  # from a list of all
    assert ((drawn.bincount(minlength=10) - 400).abs() < 5 * 18).all()


@every_pattern
def test_a_draw_depends_on_the_seed_and_the_name_alone(pattern: str) -> None:
    """A pattern without random draws depends on neither."""

    def mask(seed: int, name: str) -> Tensor:
        return mask_of(places_of(pattern, 48, 32, 8, seed, name), 48, 32)

    torch.manual_seed(1)
    first = mask(0, "layers.0.q_proj")
    torch.manual_seed(2)
    with torch.device("meta"):
        again = places_of(pattern, 48, 32, 8, 0, "layers.0.q_proj")
    assert torch.equal(mask_of(again, 48, 32), first)
    generator, untouched = (generator_for(0, "layers.0.q_proj") for _ in range(2))
    draw(pattern, pattern_shape(pattern, 48, 32, Fraction(1, 8)), 48, 32, generator)
    is_fixed = torch.equal(generator.get_state(), untouched.get_state())
    assert torch.equal(mask(1, "layers.0.q_proj"), first) == is_fixed
    assert torch.equal(mask(0, "layers.1.q_proj"), first) == is_fixed


def test_patterns_are_different() -> None:
    masks = [mask_of(places_of(pattern, 48, 32, 8), 48, 32) for pattern in PATTERNS]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


@pytest.mark.parametrize("known_as_blocks", [False, True])
def test_a_pattern_that_is_named_and_not_written_is_an_error(
    known_as_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it trained the diagonal under another name."""
    for module in (patterns, sparse):
        monkeypatch.setattr(module, "PATTERNS", (*PATTERNS, "spiral"))
        if known_as_blocks:
            monkeypatch.setattr(module, "BLOCK_PATTERNS", (*BLOCK_PATTERNS, "spiral"))
    config = SparseConfig(pattern="spiral", density="1/8", target_modules=["0"])
    with pytest.raises(ValueError, match=r"pattern='spiral' is unknown to diablo\.blocks\.patterns"):
        get_peft_model(nn.Sequential(nn.Linear(48, 32)), config)  # pyright: ignore[reportArgumentType]


def test_a_count_of_rows_is_paca() -> None:
    shape = pattern_shape("random_row", 48, 32, Fraction(1, 64), count=5)
    assert shape == (1, 5, 32)
    assert pattern_shape("random_column", 48, 32, Fraction(1, 64), count=5) == (1, 48, 5)


@pytest.mark.parametrize(
    ("pattern", "sides", "density", "message"),
    [
        ("random_row", (10, 8), "1/4", r"density=1/4 of in_features=10 × out_features=8 makes 2\.5 of 10 rows"),
        ("random_column", (8, 10), "1/4", r"makes 2\.5 of 10 columns"),
        ("random_row", (4, 8), "1/8", r"makes 0\.5 of 4 rows, which must be a whole number of at least 1"),
        ("random_entry", (3, 3), "1/2", r"makes 4\.5 of 9 entries"),
        ("banded", (8, 10), "1/4", r"makes 2\.5 of 10 entries per row"),
        ("random_block", (10, 8), "1/4", r"makes 2\.5 of 10 features per block"),
        ("permuted_block", (8, 8), "3/4", r"density=3/4 must be 1/N"),
    ],
)
def test_a_density_that_does_not_divide_is_refused(
    pattern: str, sides: tuple[int, int], density: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pattern_shape(pattern, *sides, Fraction(density))


def test_a_count_outside_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="count=49 must be between 1 and the layer's 48 rows"):
        pattern_shape("random_row", 48, 32, Fraction(1), count=49)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "random_rows"}, "pattern='random_rows': choose one of diagonal"),
        ({"pattern": "random_block", "count": 3}, "count=3 is for random_row and random_column"),
        ({"density": "a lot"}, r"density='a lot' is not a share: write e\.g\. '1/64'"),
        ({"density": "1/0"}, "density='1/0' is not a share"),
        ({"density": 0.0}, r"density=0.0 must be above 0"),
        ({"density": 1.5}, r"density=1.5 must be above 0 and at most 1"),
        ({"pattern": "diagonal", "density": 0.3}, "density=0.3 of pattern=diagonal must be 1/N"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig(**fields)


@pytest.mark.parametrize("density", ["1/64", 1 / 64, "0.015625"])
def test_a_density_is_exact_however_it_is_written(density: float | str) -> None:
    assert SparseConfig(density=density).fraction == Fraction(1, 64)
    assert SparseConfig(density=1 / 3).fraction == Fraction(1, 3)


# Training


@every_pattern
@pytest.mark.parametrize("n", [4, 32])  # on the CPU only one of them takes single entries from the dense gradient
@pytest.mark.parametrize("mode", ["in_place", "adapter"])
def test_gradients_and_steps_are_those_of_full_fine_tuning_at_the_chosen_entries(
    pattern: str, n: int, mode: Literal["adapter", "in_place"]
) -> None:
    torch.manual_seed(0)
    full = nn.Linear(96, 64, dtype=torch.float64)
    layer = layer_of(pattern, full, mode, n).double()
    x = torch.randn(2, 7, 96, dtype=torch.float64, requires_grad=True)
    layer_x = x.detach().clone().requires_grad_()
    positions = layer.positions("default")
    assert positions is not None
    mask = mask_of(positions, 96, 64).T
    original = full.weight.detach().clone()
    sgd = torch.optim.SGD(layer.diablo_blocks.parameters(), lr=0.1)
    for _ in range(2):  # the second time with non-zero values
        full.zero_grad()
        sgd.zero_grad()
        for module, inputs in ((full, x), (layer, layer_x)):
            inputs.grad = None
            module(inputs).pow(3).sum().backward()
        assert full.weight.grad is not None
        torch.testing.assert_close(layer_x.grad, x.grad)
        gradient = layer.diablo_blocks["default"].grad
        assert gradient is not None
        torch.testing.assert_close(delta_weight(gradient, positions, 96, 64), full.weight.grad * mask)
        sgd.step()
        with torch.no_grad():
            full.weight -= 0.1 * full.weight.grad * mask
        torch.testing.assert_close(layer(x), full(x))
        torch.testing.assert_close(layer.get_delta_weight("default"), full.weight - original)
    assert torch.equal((layer.get_delta_weight("default") != 0).long(), mask)


@every_pattern
def test_both_modes_agree_in_bf16(pattern: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 32, dtype=torch.bfloat16)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    layers = [layer_of(pattern, base, mode, 4, init_weights=False) for mode in ("in_place", "adapter")]
    layers[1].diablo_blocks["default"].data = layers[0].diablo_blocks["default"].data.clone()
    outputs = [layer(x) for layer in layers]
    torch.testing.assert_close(*outputs, atol=0.1, rtol=0.05)
    for output in outputs:
        output.float().pow(2).sum().backward()
    gradients: list[Any] = [layer.diablo_blocks["default"].grad for layer in layers]
    torch.testing.assert_close(*gradients, atol=0.5, rtol=0.05)


def test_dropout_drops_inputs_of_the_entries_only() -> None:
    """With D = -W0 on every entry the output is W0 (x - dropout(x)): an input counts with weight 1 or 1 - 1/(1 - p)."""
    base = nn.Linear(16, 16, bias=False)
    base.weight.data.copy_(torch.eye(16))
    layer = layer_of("random_entry", base, "adapter", 1, dropout=0.5).train()
    layer.diablo_blocks["default"].data.fill_(0)
    positions = layer.positions("default")
    assert positions is not None
    diagonal = positions.inputs == positions.outputs
    layer.diablo_blocks["default"].data[diagonal.flatten()] = -1.0
    y = layer(torch.ones(40, 16))
    assert set(y.unique().tolist()) == {1.0, -1.0}
    assert torch.equal(layer.eval()(torch.ones(4, 16)), torch.zeros(4, 16))


def kept_sizes(layer: nn.Module, x: Tensor) -> list[int]:
    """Return the sizes of tensors, except indices, that a forward pass keeps for the backward pass."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sizes


def test_rows_in_place_keep_only_their_own_inputs() -> None:
    base, x = nn.Linear(64, 64), torch.randn(10, 64)
    layer = layer_of("random_row", base, "in_place", 16)
    assert kept_sizes(layer, x) == [10 * 4, 4 * 64]  # the inputs of 4 rows, and the trained values
    for pattern in BLOCK_PATTERNS:
        assert kept_sizes(layer_of(pattern, base, "in_place", 16), x)[0] == x.numel()
