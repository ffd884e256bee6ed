"""Quantising a whole model layer by layer: errors, storage, resuming, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from diablo.quantize import (
    QuantizationSettings,
    QuantizedLinear,
    calibration_windows,
    load_quantized,
    normal_float,
    quantize_model,
    save_quantized,
    sizes,
)
from diablo.quantize import model as model_module
from diablo.quantize.activations import Activations
from diablo.quantize.apiq import ClippedLinear
from diablo.quantize.grids import fit_grid
from diablo.quantize.loftq import loftq
from diablo.quantize.storage import quantized_layers
from tests.diablo.quantized_models import (
    GROUP,
    LAYERS,
    LINEARS,
    decoder_linears,
    llama,
    logits,
    quantized_llama,
    tokens,
)

FACTORS = {"apiq": {"rank": 4, "epochs": 3}, "loftq": {"rank": 4}}


def settings_of(method: str, bits: int = 3, **options: Any) -> QuantizationSettings:
    return QuantizationSettings(method, bits, GROUP, options=FACTORS.get(method, {}) | options)


def quantized(method: str, folder: Path, bits: int = 3, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    model = llama()
    return model, quantize_model(model, settings_of(method, bits, **options), folder, tokens(), progress=False)


def output_errors(record: dict[str, Any]) -> dict[str, float]:
    return {f"{x['name']}.{n}": e["output"] for x in record["layers"] for n, e in x["linears"].items()}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_better_than_rounding_summed_over_the_model(bits: int, tmp_path: Path) -> None:
    _, rounded = quantized("rtn", tmp_path / "rtn", bits)
    _, fitted = quantized("gptq", tmp_path / "gptq", bits)
    theirs, ours = output_errors(rounded), output_errors(fitted)
    assert len(ours) == LINEARS
    assert sum(ours.values()) < 0.8 * sum(theirs.values())
    worse = [name for name in ours if ours[name] >= theirs[name]]
    assert not worse, worse


def test_outputs_come_closer_with_more_bits_and_better_methods(tmp_path: Path) -> None:
    base = logits(llama())
    distance = {
        (method, bits): (logits(quantized(method, tmp_path / f"{method}{bits}", bits)[0]) - base).norm().item()
        for method, bits in [("rtn", 2), ("rtn", 4), ("rtn", 8), ("gptq", 2), ("gptq", 4), ("nf", 2), ("magr", 2)]
    }
    assert distance["rtn", 8] < 0.1 * distance["rtn", 4] < 0.1 * distance["rtn", 2]
    assert distance["gptq", 2] < distance["rtn", 2] < distance["nf", 2]
    assert distance["gptq", 4] < distance["rtn", 4]
    assert distance["magr", 2] < distance["rtn", 2]


def test_the_recorded_error_is_that_of_the_outputs(tmp_path: Path) -> None:
    model, record = quantized("rtn", tmp_path)
    full = llama()
    x: list[torch.Tensor] = []
    layer = full.model.layers[0]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    full(input_ids=tokens())
    wanted = layer.mlp.down_proj(x[0])
    found = model.model.layers[0].mlp.down_proj(x[0])
    expected = ((found - wanted).square().sum() / wanted.square().sum()).item()
    assert output_errors(record)["model.layers.0.mlp.down_proj"] == pytest.approx(expected, rel=1e-3)


def test_the_second_layer_is_fitted_to_what_the_quantised_first_one_gives(tmp_path: Path) -> None:
    model, _ = quantized("gptq", tmp_path, 2)
    x: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    for row in tokens():
        model(input_ids=row[None])
    inputs = torch.cat([part.reshape(-1, 64) for part in x])
    weight = llama().model.layers[1].self_attn.q_proj.weight
    expected, _ = settings_of("gptq", 2).quantize("q_proj", weight, inputs.T @ inputs)
    found = model.model.layers[1].self_attn.q_proj.quantized()
    assert (found.codes == expected.codes).float().mean() > 0.99


@pytest.mark.parametrize("method", ["rtn", "nf", "gptq", "magr", "loftq", "apiq"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same_model(method: str, tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    record = quantize_model(model, settings_of(method), tmp_path, tokens(), progress=False)
    loaded = load_quantized(tmp_path)
    assert len(quantized_layers(loaded)) == LINEARS
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.quantization["hash"] == record["hash"]  # pyright: ignore
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = save_quantized(loaded, tmp_path / "again")
    assert again["hash"] == record["hash"]


def test_loading_never_holds_a_decoder_weight_of_full_precision(tmp_path: Path, monkeypatch: Any) -> None:
    quantized("rtn", tmp_path)
    made: list[torch.device] = []
    original = nn.Linear.__init__

    def watched(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self.weight.device)

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    load_quantized(tmp_path)
    assert {device.type for device in made} == {"meta"}


@pytest.mark.parametrize("bits", [2, 4])
def test_the_memory_of_a_base_is_that_of_the_arithmetic(bits: int, tmp_path: Path) -> None:
    _, record = quantized("rtn", tmp_path, bits)
    weights = sum(linear.weight.numel() for linear in decoder_linears(llama()).values())
    expected = weights * (bits + 16 / GROUP + 8 / GROUP) / 8
    assert record["quantized_bytes"] == pytest.approx(expected, rel=0.05)
    assert record["bits_per_weight"] == pytest.approx(bits + 1.5, rel=0.05)
    assert sizes(load_quantized(tmp_path))["quantized_bytes"] == record["quantized_bytes"]
    stored = sum((tmp_path / "layers" / f"{i:05d}.safetensors").stat().st_size for i in range(LAYERS))
    assert stored < expected + LAYERS * 8000  # headers and norms


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["gptq", "loftq", "apiq"])
def test_an_interrupted_quantisation_goes_on_and_gives_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, record = quantized(method, tmp_path / "whole")
    work, name = "_train" if method == "apiq" else "_quantize_each", "model.layers.1"
    original = getattr(model_module, work)

    def interrupted(layer: str, *rest: Any) -> Any:
        if layer == name:
            raise Stop
        return original(layer, *rest)

    monkeypatch.setattr(model_module, work, interrupted)
    with pytest.raises(Stop):
        quantized(method, tmp_path / "parts")
    assert (tmp_path / "parts" / "layers" / "00000.safetensors").is_file()
    with pytest.raises(ValueError, match="unfinished"):
        load_quantized(tmp_path / "parts")
    calls: list[str] = []
    monkeypatch.setattr(model_module, work, lambda layer, *rest: calls.append(layer) or original(layer, *rest))
    resumed, again = quantized(method, tmp_path / "parts")
    assert calls == [name]
    assert again["hash"] == record["hash"]
    assert torch.equal(logits(resumed), logits(expected))
    if method in FACTORS:
        one, other = (tmp_path / part / "adapter" / "adapter_model.safetensors" for part in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_begun_with_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    quantized("rtn", tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"started with bits=3, now bits=2.*kept"):
        quantized("rtn", tmp_path, 2)
    with pytest.raises(ValueError, match=r"started with method=rtn, now method=nf"):
        quantized("nf", tmp_path, 3)
    other = llama()
    other.lm_head.weight.data += 1
    with pytest.raises(ValueError, match=r"started with base=\w+, now base="):
        quantize_model(other, settings_of("rtn"), tmp_path, tokens(), progress=False)
    with pytest.raises(ValueError, match=r"started with calibration=\w+, now calibration="):
        quantize_model(llama(), settings_of("rtn"), tmp_path, tokens(4), progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_activations_that_are_not_finite_name_the_layer_and_leave_the_finished_ones(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1: activations are not finite"):
        quantize_model(model, settings_of("gptq"), tmp_path, tokens(), progress=False)
    assert (tmp_path / "layers" / "00000.safetensors").is_file()


def test_bad_settings_and_calibration_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bits=9 must be from 2 to 8"):
        QuantizationSettings("gptq", 9)
    with pytest.raises(ValueError, match="method=awq: choose from rtn, nf, gptq, magr, loftq, apiq"):
        QuantizationSettings("awq", 4)
    with pytest.raises(ValueError, match=r"options\.damp: gptq takes damp_percent, shrink"):
        QuantizationSettings("gptq", 4, options={"damp": 0.1})
    with pytest.raises(ValueError, match="nf has no symmetric grid"):
        QuantizationSettings("nf", 4, sym=True)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size=48 does not divide 64"):
        quantize_model(llama(), QuantizationSettings("rtn", 4, 48), tmp_path / "x")
    with pytest.raises(ValueError, match="gptq needs token ids"):
        quantize_model(llama(), settings_of("gptq"), tmp_path / "x")
    for empty in (tokens()[:0], tokens()[:, :0], tokens()[0]):
        with pytest.raises(ValueError, match="calibration: ids of shape"):
            quantize_model(llama(), settings_of("gptq"), tmp_path / "x", empty)
    with pytest.raises(ValueError, match="already quantised"):
        quantize_model(quantized_llama(), settings_of("rtn"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_calibration_windows_are_stretches_of_the_text() -> None:
    text = torch.arange(100)
    windows = calibration_windows(text, 5, 20, seed=1)
    assert windows.shape == (5, 20)
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 20)) for row in windows)
    assert torch.equal(windows, calibration_windows(text, 5, 20, seed=1))
    assert torch.equal(calibration_windows(text[:20], 2, 20), text[:20].expand(2, 20))
    for short in (text[:19], text[:0]):
        with pytest.raises(ValueError, match=f"{short.numel()} tokens do not give 2 sequences of 20"):
            calibration_windows(short, 2, 20)


def test_layers_that_are_called_differently_are_refused_where_inputs_count(tmp_path: Path) -> None:
    model = llama()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layers of several kinds \(full_attention, sliding_attention\)"):
        quantize_model(model, settings_of("gptq", 4), tmp_path / "gptq", tokens(), progress=False)
    quantize_model(model, settings_of("rtn", 4), tmp_path / "rtn", progress=False)


@pytest.mark.parametrize("targets", [["nothing"], ["self_attn.q_proj"]])
def test_targets_that_are_not_there_are_refused_before_the_work(targets: list[str], tmp_path: Path) -> None:
    settings = QuantizationSettings("loftq", 4, 16, target_modules=targets)
    with pytest.raises(ValueError, match="no linear layer is named"):
        quantize_model(llama(), settings, tmp_path, progress=False)
    with pytest.raises(ValueError, match="give a list of names"):
        QuantizationSettings("loftq", 4, 16, target_modules="all-linear")  # pyright: ignore


def test_a_changed_or_missing_file_is_found(tmp_path: Path) -> None:
    quantized("rtn", tmp_path)
    file = tmp_path / "layers" / "00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001\.safetensors: missing or changed"):
        load_quantized(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"00001\.safetensors: missing or changed"):
        load_quantized(tmp_path)
    record = json.loads((tmp_path / "quantization.json").read_text(encoding="utf-8"))
    record["linears"]["model.layers.0.mlp.up_proj"]["bits"] = 4
    (tmp_path / "quantization.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=r"quantization\.json: changed"):
        load_quantized(tmp_path)
    with pytest.raises(ValueError, match="no quantization"):
        load_quantized(tmp_path / "layers")


def test_a_model_that_is_not_quantised_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer of the model is quantised"):
        save_quantized(llama(), tmp_path)


def test_a_bf16_base_is_quantised_and_loaded_in_bf16(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    quantize_model(model, settings_of("apiq", 4), tmp_path, tokens(), progress=False)
    loaded = load_quantized(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert logits(loaded).dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_activations_are_those_of_the_model() -> None:
    model = llama()
    activations = Activations(model, model.model.layers, tokens())
    states = activations.quantized
    for index, layer in enumerate(model.model.layers):
        states = activations.through(f"layer {index}", layer, states)
    with torch.no_grad():
        expected = model.model(input_ids=tokens()).last_hidden_state
    torch.testing.assert_close(model.model.norm(torch.cat(states)), expected, atol=1e-5, rtol=1e-5)


def test_apiq_starts_at_its_clipping_and_trains_it_and_the_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    module = ClippedLinear(linear, 2, 16, rank=4, scaling=0.5)
    scale, zero = module.grid()
    # sigmoid(4) of the range on both sides; both ends shrink equally, so the zero point is unchanged.
    full, expected_zero = fit_grid(linear.weight.detach().view(8, 2, 16), 2)
    torch.testing.assert_close(scale, full * torch.sigmoid(torch.tensor(4.0)), rtol=2e-3, atol=0)
    assert torch.equal(zero, expected_zero)
    x = torch.randn(5, 32)
    quantized_only = QuantizedLinear.from_weight(module.quantized(), linear.bias)
    torch.testing.assert_close(module(x), quantized_only(x))  # B is 0
    module(x).square().sum().backward()
    for parameter in (module.high, module.low, module.factor_b):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_apiq_brings_the_model_nearer_and_its_adapter_is_a_lora(tmp_path: Path) -> None:
    base = logits(llama())
    model, record = quantized("apiq", tmp_path / "apiq", 2, epochs=8)
    rounded, _ = quantized("rtn", tmp_path / "rtn", 2)
    for layer in record["layers"]:
        assert layer["losses"][-1] < layer["losses"][0]
    alone = logits(load_quantized(tmp_path / "apiq"))
    adapted: Any = PeftModel.from_pretrained(load_quantized(tmp_path / "apiq"), str(tmp_path / "apiq" / "adapter"))
    together = logits(adapted.eval())
    assert (together - base).norm() < (alone - base).norm() < (logits(rounded) - base).norm()
    assert torch.equal(alone, logits(model))
    assert adapted.peft_config["default"].r == 4


def test_grouped_query_attention_and_biases_are_kept(tmp_path: Path) -> None:
    model = llama(attention_bias=True)
    for linear in decoder_linears(model).values():
        if linear.bias is not None:
            linear.bias.data.normal_()
    quantize_model(model, settings_of("gptq"), tmp_path, tokens(), progress=False)
    loaded = load_quantized(tmp_path)
    assert isinstance(loaded.config, LlamaConfig)
    assert loaded.model.layers[0].self_attn.k_proj.bias.shape == (32,)
    assert torch.equal(logits(loaded), logits(model))


def test_loftq_equals_its_definition_and_the_rank_decides_how_much_is_left() -> None:
    weight = llama().model.layers[0].mlp.up_proj.weight.detach()
    left = []
    for rank in (1, 8, 32, 64):
        quantized, (a, b) = loftq(weight, 2, GROUP, rank, lora_alpha=16, iterations=1)
        assert torch.equal(quantized.codes, normal_float(weight, 2, GROUP).codes)
        # The remaining error consists of the singular values beyond the rank.
        difference = weight - quantized.dequantize()
        left.append((difference - 16 / rank * b @ a).square().sum().item())
        expected = torch.linalg.svdvals(difference)[rank:].square().sum().item()
        assert left[-1] == pytest.approx(expected, abs=1e-5)
    assert left == sorted(left, reverse=True)
    quantized, (a, b) = loftq(weight, 2, GROUP, 8, lora_alpha=8, iterations=5)
    assert (weight - quantized.dequantize() - b @ a).square().sum().item() < left[1]
    with pytest.raises(ValueError, match="rank=65 exceeds the 64 singular values"):
        loftq(weight, 2, GROUP, 65)


def test_loftq_starts_nearer_to_the_base_than_its_weights_alone(tmp_path: Path) -> None:
    _, record = quantized("loftq", tmp_path, 2, rank=16)
    alone = load_quantized(tmp_path)
    distance = (logits(alone) - logits(llama())).norm()
    adapted: Any = PeftModel.from_pretrained(alone, str(tmp_path / "adapter")).eval()
    assert (logits(adapted) - logits(llama())).norm() < distance
    assert len(output_errors(record)) == LINEARS
