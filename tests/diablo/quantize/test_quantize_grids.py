"""Grids, rounding to them, and packing of codes into words."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from diablo.quantize import normal_float, normal_float_levels, round_to_nearest
from diablo.quantize.packing import pack, packed_words, unpack


def random_weight(rows: int = 6, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_asymmetric_grid_by_hand() -> None:
    # From -1 to 2 in 3 steps of 1: zero is code 1. 0.5 is halfway: half to even, so 0; 1.5 becomes 2.
    weight = round_to_nearest(torch.tensor([[-1.0, 2.0, 0.4, 0.5, 1.5, -0.6]]), bits=2)
    assert weight.codes.tolist() == [[0, 3, 1, 1, 3, 0]]
    assert (weight.scales.tolist(), weight.zeros and None, weight.zeros.tolist()) == ([[1.0]], None, [[1]])  # pyright: ignore
    assert weight.dequantize().tolist() == [[-1.0, 2.0, 0.0, 0.0, 2.0, -1.0]]


def test_a_symmetric_grid_by_hand() -> None:
    # The greatest magnitude is 3: from -3 to 3 in 3 steps of 2, zero is code 2, so the values are -4, -2, 0, 2.
    weight = round_to_nearest(torch.tensor([[-1.5, 3.0, 0.9, -3.0]]), bits=2, sym=True)
    assert weight.dequantize().tolist() == [[-2.0, 2.0, 0.0, -4.0]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [-1, 32])
def test_no_weight_is_further_than_half_a_step_from_its_value(bits: int, group_size: int) -> None:
    weight = random_weight()
    result = round_to_nearest(weight, bits, group_size)
    groups = (result.dequantize() - weight).view(6, result.scales.shape[1], -1)
    # Rounding the scale to float16 (relative 2^-11) moves the ends by up to 2^bits steps of that.
    assert (groups.abs() <= result.scales[..., None].double() * (0.5 + 2**bits * 2**-11)).all()


def test_a_group_as_wide_as_the_row_is_the_row() -> None:
    one, other = round_to_nearest(random_weight(), 3, 128), round_to_nearest(random_weight(), 3, -1)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_rows_of_zeros_and_of_one_sign_have_grids() -> None:
    weight = torch.stack([torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.tensor([-3.0, -1.0, -2.0, -3.0])])
    assert round_to_nearest(weight, 2).dequantize().tolist() == weight.tolist()
    assert normal_float(torch.zeros(1, 4), 2, -1).dequantize().tolist() == [[0.0] * 4]


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_cannot_be_stored_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} must be from 2 to 8"):
        round_to_nearest(random_weight(), bits)


def test_bad_weights_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size=48 does not divide 128 input features"):
        round_to_nearest(random_weight(), 4, 48)
    with pytest.raises(ValueError, match="finite"):
        round_to_nearest(torch.tensor([[1.0, math.nan]]), 4)
    with pytest.raises(ValueError, match="does not fit float16"):
        round_to_nearest(torch.tensor([[1e7, 0.0]]), 2)


def test_normal_float_levels_are_the_published_ones() -> None:
    torch.testing.assert_close(normal_float_levels(2), torch.tensor([-1, 0, 0.3379, 1]), atol=5e-5, rtol=0)
    functional = pytest.importorskip("bitsandbytes.functional")
    published = functional.get_4bit_type("nf4", device="cpu").sort().values
    torch.testing.assert_close(normal_float_levels(4), published, atol=1e-6, rtol=0)


def test_nf4_agrees_with_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(8, 256).float()
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    ours = normal_float(weight, 4, 64).dequantize()
    # Their scales are float32, ours float16; a weight halfway between two levels may be rounded to either.
    close = torch.isclose(ours, theirs, rtol=1e-3)
    assert close.float().mean() > 0.995
    torch.testing.assert_close((ours - weight).norm(), (theirs - weight).norm(), rtol=1e-3, atol=0)


@given(
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(0, 13), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)
def test_packing_is_exact_for_codes_of_any_shape(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.numel() == packed_words(codes.numel(), bits)
    assert torch.equal(unpack(words, bits, shape), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_takes_no_more_than_its_bits(bits: int) -> None:
    assert packed_words(32 * 100, bits) == bits * 100


def test_two_bit_codes_lie_sixteen_to_a_word_lowest_first() -> None:
    words = pack(torch.tensor([3, 0, 1, 2] * 4, dtype=torch.uint8), 2)
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [0b10010011_10010011_10010011_10010011]


def test_codes_that_need_more_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="codes from 1 to 4 do not fit 2 bits"):
        pack(torch.tensor([1, 4], dtype=torch.uint8), 2)
