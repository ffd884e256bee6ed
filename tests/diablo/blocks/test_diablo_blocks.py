"""The maths of diablo/blocks/products.py against dense definitions, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo.blocks import products
from diablo.blocks.products import (
    BlockShape,
    add_block_product_,
    block_gradient,
    block_product,
    block_shape,
    covered,
    delta_weight,
    diagonal_blocks,
    neighbours,
    num_parameters,
)

sizes = st.integers(1, 40)


def random_blocks(in_features: int, out_features: int, num_blocks: int) -> torch.Tensor:
    shape = block_shape(in_features, out_features, num_blocks, allow_uneven=True)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dense_by_definition(blocks: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """Build the paper's D, (in, out), entry by entry: D[p, q] is in block i iff p // d_in == q // d_out == i."""
    _, d_in, d_out = blocks.shape
    dense = torch.zeros(in_features, out_features, dtype=blocks.dtype)
    for p in range(in_features):
        for q in range(out_features):
            if p // d_in == q // d_out:
                dense[p, q] = blocks[p // d_in, p % d_in, q % d_out]
    return dense


@given(d_in=sizes, d_out=sizes, num_blocks=st.integers(1, 12))
def test_even_split_has_the_paper_s_shape_and_count(d_in: int, d_out: int, num_blocks: int) -> None:
    in_features, out_features = d_in * num_blocks, d_out * num_blocks
    assert block_shape(in_features, out_features, num_blocks) == (num_blocks, d_in, d_out)
    assert block_shape(in_features, out_features, num_blocks, allow_uneven=True) == (num_blocks, d_in, d_out)
    assert num_parameters(in_features, out_features, num_blocks) == in_features * out_features // num_blocks


@given(in_features=sizes, out_features=sizes, num_blocks=st.integers(1, 50))
def test_uneven_split_covers_the_weight_with_as_few_blocks(
    in_features: int, out_features: int, num_blocks: int
) -> None:
    n, d_in, d_out = block_shape(in_features, out_features, num_blocks, allow_uneven=True)
    assert (d_in, d_out) == (math.ceil(in_features / num_blocks), math.ceil(out_features / num_blocks))
    assert n <= num_blocks
    assert n * d_in >= in_features
    assert n * d_out >= out_features
    assert (n - 1) * d_in < in_features or (n - 1) * d_out < out_features


def test_uneven_split_may_need_fewer_blocks_than_asked_for() -> None:
    assert block_shape(10, 10, 7, allow_uneven=True) == (5, 2, 2)
    assert num_parameters(10, 10, 7, allow_uneven=True) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (4096, 1024, 96),
            r"num_blocks=96 does not divide in_features=4096 and out_features=1024; "
            r"nearest values that divide both: 64 and 128 \(or set allow_uneven=True\)",
        ),
        ((10, 20, 100), r"num_blocks=100 .*in_features=10 .*out_features=20; .*both: 10 \("),
        ((7, 9, 2), r"both: 1 \("),
        ((8, 8, 0), "num_blocks=0 must be at least 1"),
    ],
)
def test_a_split_that_does_not_divide_is_refused_with_the_nearest_that_do(
    arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        block_shape(*arguments)
    assert "\n" not in str(caught.value)


@given(in_features=sizes, out_features=sizes, num_blocks=st.integers(1, 12), tokens=st.integers(0, 5))
def test_product_gradient_and_delta_weight_equal_the_dense_definition(
    in_features: int, out_features: int, num_blocks: int, tokens: int
) -> None:
    blocks = random_blocks(in_features, out_features, num_blocks)
    dense = dense_by_definition(blocks, in_features, out_features)
    torch.testing.assert_close(delta_weight(blocks, in_features, out_features), dense.T, rtol=0, atol=0)
    x = torch.randn(tokens, in_features, dtype=torch.float64)
    y = torch.randn(tokens, out_features, dtype=torch.float64)
    expected = y + x @ dense
    backward = x + y @ dense.T
    gradient = block_gradient(x, y, BlockShape(*blocks.shape), torch.float64)
    full = x.T @ y  # the paper's orientation, (in, out)
    torch.testing.assert_close(
        delta_weight(gradient, in_features, out_features).T,
        full * dense_by_definition(torch.ones_like(blocks), in_features, out_features),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        add_block_product_(x.clone(), y, blocks.transpose(1, 2)), backward, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(block_product(x, blocks, out_features), expected - y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(add_block_product_(y, x, blocks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sides", "uneven"), [((6, 20), 0), ((20, 6), 0), ((6, 20), 5)])
def test_neighbouring_blocks_multiplied_as_one_give_the_same(
    monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int], uneven: int
) -> None:
    """As on a GPU where a block's rows are not aligned."""
    blocks = torch.randn(8, *sides, dtype=torch.float64)
    x, y = (torch.randn(7, 8 * side + uneven, dtype=torch.float64)[:, : 8 * side] for side in sides)

    def results() -> tuple[torch.Tensor, ...]:
        back = add_block_product_(x.clone(), y, blocks.transpose(1, 2))
        gradient = block_gradient(x, y, BlockShape(*blocks.shape), torch.float64)
        return block_product(x, blocks, y.shape[1]), back, gradient

    alone = results()
    monkeypatch.setattr(products, "neighbours", lambda *_: 4)
    for one, other in zip(alone, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "group"),
    [((64, 64, 64), 1), ((64, 64, 172), 2), ((64, 43, 64), 8), ((63, 64, 172), 1), ((8, 516, 516), 1)],
)
def test_blocks_are_grouped_until_their_rows_are_aligned(shape: tuple[int, int, int], group: int) -> None:
    class OnAGpu:
        is_cuda = True

        @staticmethod
        def element_size() -> int:
            return 2

    x: Any = OnAGpu()
    assert neighbours(*shape, x) == group
    assert group == 1 or all(group * side * 2 % 16 == 0 for side in shape[1:])


@given(in_features=sizes, out_features=sizes, num_blocks=st.integers(1, 12), transposed=st.booleans())
def test_diagonal_blocks_are_views_of_exactly_the_changed_entries(
    in_features: int, out_features: int, num_blocks: int, transposed: bool
) -> None:
    blocks = random_blocks(in_features, out_features, num_blocks)
    if transposed:  # as Conv1D stores its weight
        weight = torch.zeros(in_features, out_features, dtype=torch.float64).T
    else:
        weight = torch.zeros(out_features, in_features, dtype=torch.float64)
    parts = diagonal_blocks(weight, BlockShape(*blocks.shape))
    for part, block in zip(parts, covered(blocks, in_features, out_features), strict=True):
        part.copy_(block)
    torch.testing.assert_close(weight, delta_weight(blocks, in_features, out_features), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_16_bit_inputs_is_summed_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(4096, 32).to(dtype), torch.randn(4096, 48).to(dtype)
    gradient = block_gradient(x, y, BlockShape(3, 11, 16), torch.float32)
    exact = block_gradient(x.double(), y.double(), BlockShape(3, 11, 16), torch.float64)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-3)  # 16-bit sums err by 0.1


@pytest.mark.parametrize(("x_features", "y_features"), [(13, 8), (12, 9)])
def test_blocks_that_do_not_cover_the_layer_are_refused(x_features: int, y_features: int) -> None:
    with pytest.raises(ValueError, match=f"cover 12 inputs and 8 outputs, but x has {x_features} and y has"):
        add_block_product_(torch.zeros(1, y_features), torch.zeros(1, x_features), torch.zeros(4, 3, 2))
