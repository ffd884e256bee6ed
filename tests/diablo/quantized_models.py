"""A small Llama in full precision and quantised, for the tests of diablo.quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from diablo.quantize import QuantizedLinear, QuantizedWeight, normal_float, round_to_nearest
from diablo.quantize.quantized_linear import set_module

LAYERS, LINEARS, GROUP = 2, 14, 16


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a small Llama with fixed weights. The input features of every module are a multiple of 16."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    set_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**(settings | changes)), dtype=dtype).eval()


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def quantized_llama(bits: int = 3, normal: bool = False) -> Any:
    model = llama()
    for name, linear in decoder_linears(model).items():
        weight: QuantizedWeight = (normal_float if normal else round_to_nearest)(linear.weight, bits, GROUP)
        set_module(model, name, QuantizedLinear.from_weight(weight))
    return model


def tokens(sequences: int = 8, length: int = 32) -> Tensor:
    return torch.randint(64, (sequences, length), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(3, 12)).logits


def train_a_little(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens(3, 12), labels=tokens(3, 12)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
