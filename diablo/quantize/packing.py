"""Codes of 2 to 8 bits in int32 words, without unused bits.

A code is split into the powers of two of its width (3 bits: 2 + 1; 7: 4 + 2 + 1), lowest bits first. Each part is
packed separately, 32 / width to a word, the first code in a word's lowest bits. So a word holds 16 2-bit codes, and
three bits cost three bits. Words are viewed as bytes, which assumes a little-endian machine, as all usual ones are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32


def parts(bits: int) -> tuple[int, ...]:
    """Return the powers of two that sum to a width, largest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_words(count: int, bits: int) -> int:
    """Return how many int32 words hold `count` codes."""
    return sum(math.ceil(count * width / WORD) for width in parts(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of any shape, each below `2 ** bits`, into int32 words, `(packed_words(codes.numel(), bits),)`.

    Raises:
        ValueError: a code needs more bits.
    """
    flat = codes.reshape(-1)
    least, greatest = (flat.min().item(), flat.max().item()) if flat.numel() else (0, 0)
    if least < 0 or greatest >= 2**bits:
        raise ValueError(f"codes from {least} to {greatest} do not fit {bits} bits")
    flat, words, lowest = flat.to(torch.uint8), [], 0
    for width in parts(bits):
        part = (flat >> lowest) & (2**width - 1)
        lowest += width
        padded = torch.nn.functional.pad(part, (0, -part.numel() % (WORD // width)))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        words.append((padded.view(-1, 8 // width) << shifts).sum(-1, dtype=torch.uint8).view(torch.int32))
    return torch.cat(words)


def unpack(words: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the packed codes, uint8, in `shape`."""
    count, start, lowest = math.prod(shape), 0, 0
    codes = torch.zeros(count, dtype=torch.uint8, device=words.device)
    for width in parts(bits):
        stop = start + math.ceil(count * width / WORD)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=words.device)
        part = (words[start:stop].view(torch.uint8)[:, None] >> shifts) & (2**width - 1)
        codes |= part.view(-1)[:count] << lowest
        start, lowest = stop, lowest + width
    return codes.view(shape)
