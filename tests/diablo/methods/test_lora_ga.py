"""LoRA-GA's initialisation against its definition: the SVD of the gradient of the mean loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from diablo.methods.lora_ga import estimate_gradients
from diablo.methods.residual import initial_factors, save_adapter
from tests.diablo.methods.test_milora import attach, tiny_llama, tokens, train

R, ALPHA, GAMMA = 8, 16, 16
TARGETS = ["q_proj", "k_proj", "down_proj"]


def lora_ga(**settings: Any) -> LoraConfig:
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": R,
        "lora_alpha": ALPHA,
        "use_rslora": True,
        "target_modules": TARGETS,
        "init_lora_weights": "lora_ga",
        "lora_ga_config": {"direction": "ArB2r", "scale": "stable", "stable_gamma": GAMMA},
    }
    return LoraConfig(**(common | settings))


def batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    while True:
        rows = torch.randint(64, (3, 9), generator=generator)
        yield {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


def backward(base: LlamaForCausalLM) -> Callable[[], None]:
    source = batches()
    return lambda: base(**next(source)).loss.backward()


def started(**settings: Any) -> PeftModel:
    base, config = tiny_llama(), lora_ga(**settings)
    base.requires_grad_(False)
    estimate_gradients(base, config, backward(base), iterations=4)
    torch.manual_seed(0)
    return attach(base, config)


def mean_gradients() -> dict[str, Tensor]:
    base, gradients = tiny_llama(), {}
    for batch in itertools.islice(batches(), 4):
        base.zero_grad()
        base(**batch).loss.backward()
        for name, parameter in base.named_parameters():
            assert parameter.grad is not None
            gradients[name] = gradients.get(name, 0) + parameter.grad.double() / 4
    return gradients


def same_but_for_signs(one: Tensor, other: Tensor) -> None:
    """Assert that the rows of two matrices are equal up to their signs."""
    signs = (one.double() * other).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(one.double() * signs, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_the_start_is_the_svd_of_the_mean_gradient() -> None:
    """A: right singular vectors 1 to r; B: left ones r + 1 to 2r, times S out^(1/4) / sqrt(gamma), in PEFT's scale."""
    model, gradients = started(), mean_gradients()
    scaling = ALPHA / R**0.5
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{name}"
            module: Any = model.get_base_model().get_submodule(name)
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            u, s, vt = torch.linalg.svd(gradients[f"{name}.weight"], full_matrices=False)
            same_but_for_signs(a, vt[:R])
            out = u.shape[0]
            same_but_for_signs(b.T, (u[:, R : 2 * R] * s[R : 2 * R] * out**0.25 / GAMMA**0.5).T)
            original = tiny_llama().get_parameter(f"{name}.weight")
            torch.testing.assert_close(module.base_layer.weight, original - scaling * (b @ a))


def test_preparing_leaves_the_base_alone() -> None:
    base = tiny_llama()
    base.requires_grad_(False)
    config = lora_ga()
    assert estimate_gradients(base, config, backward(base), iterations=2) is config
    assert not base.training
    original = tiny_llama().state_dict()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, original[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not any(layer._backward_hooks for layer in base.modules())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": False}, {"lora_alpha": 3}])
def test_the_saved_adapter_is_plain_lora_for_the_unchanged_base(settings: dict, tmp_path: Path) -> None:
    model = started(**settings)
    initial = initial_factors(model)
    assert len(initial) == 12
    train(model)
    model.eval()
    expected = model(tokens()).logits
    save_adapter(model, tmp_path, initial)
    saved = PeftConfig.from_pretrained(str(tmp_path))
    assert type(saved) is LoraConfig
    assert saved.r == 2 * R
    assert saved.lora_ga_config is None
    base = tiny_llama()
    assert not torch.allclose(base(tokens()).logits, expected, atol=0.05)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_on_the_meta_device_nothing_is_estimated() -> None:
    with torch.device("meta"):
        base = tiny_llama()
    config = lora_ga()
    estimate_gradients(base, config, None, iterations=8)
    assert attach(base, config).get_nb_trainable_parameters()[0] == 2 * R * (64 + 48 + 80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lora_ga(), False, 8), "LoRA-GA estimates gradients on 8 batches of training examples: none are given"),
        ((lora_ga(), True, 0), "LoRA-GA estimates gradients on 0 batches of training examples: at least one is needed"),
        ((lora_ga(r=9), True, 1), r"k_proj: LoRA-GA takes 2 r = 18 triplets of a \(16, 32\) gradient"),
    ],
)
def test_what_is_missing_is_said_with_the_numbers(arguments: tuple, message: str) -> None:
    config, given, iterations = arguments
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        estimate_gradients(base, config, backward(base) if given else None, iterations=iterations)
