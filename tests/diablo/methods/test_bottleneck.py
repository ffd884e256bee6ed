"""The bottleneck adapter: its equation, its behaviour as a PEFT method, and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from diablo import BottleneckConfig
from diablo.methods.bottleneck import BottleneckLayer
from tests.diablo.blocks.test_diablo_tuner import tiny_llama

SIZE, WIDTH = 5, 32


def attach(base: nn.Module, **settings: Any) -> PeftModel:
    config = BottleneckConfig(bottleneck_size=SIZE, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(model, PeftModel)
    return model.eval()


def with_values(model: PeftModel, seed: int = 3) -> PeftModel:
    """Fill all parameters with random values; initially only W_down and b_down are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def layers(model: nn.Module) -> dict[str, BottleneckLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def test_the_equation_in_float64() -> None:
    """y + W_up gelu(W_down y + b_down) + b_up with y = W x, and its gradients, from dense matrix products."""
    base = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    model = get_peft_model(base, BottleneckConfig(bottleneck_size=3, target_modules=["0"])).double()  # pyright: ignore
    (layer,) = layers(model).values()
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (3,), (4, 3), (4,)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    trained: list[Any] = [down.weight, down.bias, up.weight, up.bias]
    for parameter, value in zip(trained, values, strict=True):
        parameter.data.copy_(value)
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    w_down, b_down, w_up, b_up = (value.clone().requires_grad_() for value in values)
    y = x @ base[0].get_base_layer().weight.T  # pyright: ignore
    inner = y @ w_down.T + b_down
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = y + gelu @ w_up.T + b_up
    result = model(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    result.square().sum().backward()
    expected.square().sum().backward()
    for parameter, reference in zip(trained, (w_down, b_down, w_up, b_up), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-12, atol=1e-12)


def test_it_starts_at_the_base_behind_the_end_of_every_sublayer() -> None:
    model = attach(tiny_llama())
    assert torch.equal(logits(model), logits(tiny_llama()))
    ends = ("self_attn.o_proj", "mlp.down_proj")
    assert {name.split("layers.")[1] for name in layers(model)} == {f"{i}.{end}" for i in range(2) for end in ends}
    for layer in layers(model).values():
        up: Any = layer.bottleneck_up["default"]
        down: Any = layer.bottleneck_down["default"]
        assert not up.weight.any()
        assert not up.bias.any()
        assert down.weight.all()
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (2 * WIDTH * SIZE + SIZE + WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_float32_beside_a_base_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    config = BottleneckConfig(bottleneck_size=SIZE, task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_llama(dtype), config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with_values(model).save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(dtype), tmp_path)
    assert model(input_ids=tokens()).logits.dtype == dtype
    assert torch.equal(logits(loaded), logits(model.eval()))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_the_model_leaves_the_bottlenecks_in_float32(cast: str) -> None:
    model = with_values(attach(tiny_llama()))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "bottleneck_" in name}
    getattr(model, cast)()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.dtype.itemsize == 2 for name, p in after.items() if name not in before)
    assert all(parameter is after[name] for name, parameter in model.named_parameters())
    model.double()
    assert {after[name].dtype for name in before} == {torch.float64}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_it_is_the_same(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = with_values(attach(tiny_llama()))
    model.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == "BOTTLENECK"
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_several_adapters_and_none() -> None:
    """One at a time, disabled, both at once (each gets the base layer's output), deleted, unloaded."""
    model = attach(tiny_llama())
    with_values(model)
    one = logits(model)
    model.add_adapter("other", BottleneckConfig(bottleneck_size=2, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), one)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(tiny_llama()))
    with_values(model, seed=4)
    assert not torch.equal(logits(model), one)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    y, parts = layer.base_layer(x), []
    for name in ("default", "other"):
        layer.set_adapter([name])
        parts.append(layer(x) - y)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), y + sum(parts), rtol=1e-5, atol=1e-5)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))  # pyright: ignore


def test_it_is_not_merged() -> None:
    model = with_values(attach(tiny_llama()))
    before = logits(model)
    with pytest.raises(NotImplementedError):
        model.merge_adapter()  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size=0 must be a whole number of at least 1"),
        ({"bottleneck_size": 2.5}, "bottleneck_size=2.5 must be a whole number"),
        ({"target_modules": ["mlp"]}, "layers.0.mlp: the sizes of LlamaMLP are unknown: not a linear layer"),
        ({"target_modules": ["nothing"]}, "target_modules: nothing matches no module of LlamaForCausalLM"),
    ],
)
def test_mistakes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), BottleneckConfig(**settings))
