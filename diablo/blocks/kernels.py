# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Triton kernels for a branch with dropout on a GPU: `dropout(x) @ diag(D_1 … D_N)`, without a mask in memory.

PyTorch needs several passes over a layer's input to drop some of it, in the forward pass and again in the backward
pass. These kernels read each operand once and compute the mask where they need it, from a hash of each element's index
and a seed. Sums are in float32 and in a fixed order, so a result is the same bit for bit every time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # of the gradient: enough to fill a GPU


@triton.jit
def _kept(index, threshold, low, high):
    """Return which elements are kept: a hash of their index, keyed by two words of 31 bits."""
    h = index.to(tl.uint32) ^ low.to(tl.uint32)
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= high.to(tl.uint32)
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    return (h >> 1) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["tokens", "scale", "threshold", "low", "high"])
def _product(
    y, x, blocks, tokens, x_stride, y_stride, block_stride, in_stride, out_stride, scale, threshold, low, high,
    N: tl.constexpr, D_IN: tl.constexpr, D_OUT: tl.constexpr, DROPS_INPUT: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs work on the same tokens, so that memory is read and written along its rows.
    tiles: tl.constexpr = (D_OUT + OUT - 1) // OUT
    tile = tl.program_id(0) % (N * tiles)
    block, row = tile // tiles, tl.program_id(0) // (N * tiles) * TOKENS + tl.arange(0, TOKENS)
    j = (tile % tiles) * OUT + tl.arange(0, OUT)
    output, inside, far = block * D_OUT + j, row < tokens, row.to(tl.int64)
    total = tl.zeros((TOKENS, OUT), tl.float32)
    for start in tl.range(0, D_IN, IN):
        k = start + tl.arange(0, IN)
        feature = block * D_IN + k
        a = tl.load(x + far[:, None] * x_stride + feature[None, :], inside[:, None] & (k < D_IN)[None, :], other=0.0)
        if DROPS_INPUT:
            a = tl.where(_kept(row[:, None] * (N * D_IN) + feature[None, :], threshold, low, high), a, 0.0)
        b = tl.load(
            blocks + block * block_stride + k[:, None] * in_stride + j[None, :] * out_stride,
            (k < D_IN)[:, None] & (j < D_OUT)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(a.to(x.dtype.element_ty), b.to(x.dtype.element_ty), total)
    if not DROPS_INPUT:
        total = tl.where(_kept(row[:, None] * (N * D_OUT) + output[None, :], threshold, low, high), total, 0.0)
    at = y + far[:, None] * y_stride + output[None, :]
    tl.store(at, (total * scale).to(y.dtype.element_ty), inside[:, None] & (j < D_OUT)[None, :])


@triton.jit(do_not_specialize=["tokens", "per_part", "scale", "threshold", "low", "high"])
def _gradient(
    parts, x, grad_y, tokens, per_part, x_stride, y_stride, scale, threshold, low, high,
    N: tl.constexpr, D_IN: tl.constexpr, D_OUT: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    tiles_in: tl.constexpr = (D_IN + IN - 1) // IN
    tiles_out: tl.constexpr = (D_OUT + OUT - 1) // OUT
    tile, part = tl.program_id(0), tl.program_id(1)
    block = tile // (tiles_in * tiles_out)
    k = (tile // tiles_out % tiles_in) * IN + tl.arange(0, IN)
    j = (tile % tiles_out) * OUT + tl.arange(0, OUT)
    feature, output = block * D_IN + k, block * D_OUT + j
    total = tl.zeros((IN, OUT), tl.float32)
    end = tl.minimum(tokens, (part + 1) * per_part)
    for start in tl.range(part * per_part, end, TOKENS):
        row = start + tl.arange(0, TOKENS)
        inside, far = row < end, row.to(tl.int64)
        a = tl.load(x + far[:, None] * x_stride + feature[None, :], inside[:, None] & (k < D_IN)[None, :], other=0.0)
        a = tl.where(_kept(row[:, None] * (N * D_IN) + feature[None, :], threshold, low, high), a, 0.0)
        b = tl.load(
            grad_y + far[:, None] * y_stride + output[None, :], inside[:, None] & (j < D_OUT)[None, :], other=0.0
        )
        total = tl.dot(tl.trans(a.to(x.dtype.element_ty)), b, total)
    at = parts + ((part * N + block) * D_IN + k[:, None]) * D_OUT + j[None, :]
    tl.store(at, total * scale, (k < D_IN)[:, None] & (j < D_OUT)[None, :])


def product(x: Tensor, blocks: Tensor, probability: float, seed: int, drops_input: bool = True) -> Tensor:
    """Return `dropout(x) @ diag(D_1 … D_N)`, `(tokens, N · d_out)`; the branch's part of dX if not `drops_input`.

    Args:
        x: `(tokens, N · d_in)`, in fp16 or bf16.
        blocks: `(N, d_in, d_out)`, also in float32.
        probability: of an element to be dropped; the others are divided by 1 - probability.
        seed: of 62 bits; gives the mask.
        drops_input: drop x; otherwise the result, with the mask of a layer whose inputs are this product's outputs.
    """
    num_blocks, d_in, d_out = blocks.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], num_blocks * d_out)
    if not y.numel():
        return y
    wide, columns = (_tile(d_in) if d_in <= 256 else 64), min(64, _tile(d_out))
    programs = num_blocks * math.ceil(d_out / columns) * math.ceil(x.shape[0] / 64)
    with torch.cuda.device_of(x):  # of a model on several GPUs, where Triton would launch on the current one
        _product[(programs,)](
            y, x, blocks, x.shape[0], x.stride(0), y.stride(0), *blocks.stride(), *_key(probability, seed),
            num_blocks, d_in, d_out, drops_input, 64, wide, columns, num_warps=4, num_stages=2,
        )  # fmt: skip
    return y


def gradient(x: Tensor, grad_y: Tensor, shape: tuple[int, int, int], probability: float, seed: int) -> Tensor:
    """Return the gradient of the blocks, `shape`, in float32, with x dropped as in `product`.

    Args:
        x: `(tokens, N · d_in)`, in fp16 or bf16.
        grad_y: `(tokens, N · d_out)`, in the same dtype.
    """
    num_blocks, d_in, d_out = shape
    if not x.shape[0]:
        return x.new_zeros(shape, dtype=torch.float32)
    x, grad_y = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, grad_y))
    wide, columns = min(64, _tile(d_in)), min(256, _tile(d_out))
    tokens = 64 if columns <= 128 else 32
    tiles = num_blocks * math.ceil(d_in / wide) * math.ceil(d_out / columns)
    per_part = math.ceil(x.shape[0] / math.ceil(PROGRAMS / tiles) / tokens) * tokens
    splits = math.ceil(x.shape[0] / per_part)
    parts = torch.empty((splits, *shape), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _gradient[tiles, splits](
            parts, x, grad_y, x.shape[0], per_part, x.stride(0), grad_y.stride(0), *_key(probability, seed),
            num_blocks, d_in, d_out, tokens, wide, columns, num_warps=4, num_stages=4,
        )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Run the kernels on small blocks, so that a Triton that cannot compile for this device raises its error here."""
    x, grad_y = torch.ones(16, 512, device=device, dtype=dtype), torch.ones(16, 512, device=device, dtype=dtype)
    whole = product(x, x.new_full((2, 256, 256), 2**-8), 0.0, 0), gradient(x, grad_y, (2, 256, 256), 0.0, 0)
    if not (torch.equal(whole[0], x) and torch.equal(whole[1], whole[1].new_full((2, 256, 256), 16))):
        raise RuntimeError("a small product is wrong")


def _key(probability: float, seed: int) -> tuple[float, int, int, int]:
    return 1 / (1 - probability), round(probability * 2**31), seed % 2**31, seed >> 31


def _tile(side: int) -> int:
    return max(16, 1 << (side - 1).bit_length())  # a power of two, as Triton asks for, and enough for its matrix units
