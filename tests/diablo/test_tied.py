"""A shared weight: an adapter on the output layer of a model whose embedding is the same tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from diablo import DiabloConfig, LoriConfig, MiloraConfig, SmtConfig, SparseConfig
from diablo.methods.residual import check_start, initial_factors, save_adapter
from diablo.quantize import QuantizedLinear, load_quantized, merge_to_grid, round_to_nearest, save_quantized
from diablo.quantize.quantized_linear import set_module
from diablo.tied import untie
from experiments.config import Method
from experiments.errors import UserError
from experiments.merge import merge
from experiments.plan.compose import plan
from experiments.train import methods
from tests.conftest import planned
from tests.diablo.blocks.test_diablo_tuner import tiny_llama
from tests.diablo.quantized_models import decoder_linears, llama

HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
OURS: dict[str, PeftConfig] = {
    "diablo": DiabloConfig(num_blocks=4, **HEAD),
    "sparse": SparseConfig(density="1/4", **HEAD),
    "smt": SmtConfig(block_size=16, blocks={"lm_head": [[0, 0], [1, 3]]}, target_modules=["lm_head"]),
    "lori": LoriConfig(r=2, **HEAD),
}
PEFTS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, **HEAD),
    "dora": LoraConfig(r=2, use_dora=True, **HEAD),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens"]),
    "both": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    "ia3": IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "trained_head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained_embedding": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}


def base(tied: bool = True, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    return tiny_llama(dtype, tied)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def trained(model: Any, config: PeftConfig) -> PeftModel:
    """Return the model with the adapter attached and random values in the trained parameters."""
    attached: Any = get_peft_model(model, config).eval()
    nn.Module.to(attached, logits(model).dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return attached


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def assert_merged(merged: Any, expected: Tensor, folder: Path) -> None:
    assert_close(logits(merged), expected)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert loaded.config.tie_word_embeddings is False
    assert_close(logits(loaded), expected)


@pytest.mark.parametrize("name", OURS)
def test_our_tuners_untie_when_they_merge(name: str, tmp_path: Path) -> None:
    model = trained(base(), OURS[name])
    expected, embedding = logits(model), base().model.embed_tokens.weight
    assert not torch.allclose(expected, logits(base()), atol=1e-2)
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert_close(logits(model), expected)
    assert_merged(model.merge_and_unload(), expected, tmp_path)
    assert torch.equal(model.get_base_model().get_input_embeddings().weight, embedding)  # pyright: ignore


def test_a_merged_output_layer_is_w_plus_d_and_the_embedding_is_w() -> None:
    """Against a dense float64 sum, merged layer by layer as PEFT's own callers do."""
    model = trained(base(), DiabloConfig(num_blocks=4, target_modules=["lm_head"]))
    layer: Any = model.get_submodule("base_model.model.lm_head")
    blocks, original = layer.diablo_blocks["default"].detach(), base().lm_head.weight.detach()
    layer.merge()
    assert_close(layer.weight, original + torch.block_diag(*blocks).T)
    assert torch.equal(model.get_base_model().get_input_embeddings().weight, original)  # pyright: ignore
    merged: Any = model.merge_and_unload()
    assert_close(merged.lm_head.weight, original + torch.block_diag(*blocks).T)


def test_a_second_adapter_on_the_untied_layer() -> None:
    model = trained(base(), DiabloConfig(num_blocks=4, target_modules=["lm_head"]))
    one = logits(model)
    model.add_adapter("other", DiabloConfig(num_blocks=8, target_modules=["lm_head"], init_weights=False))
    model.double()
    model.base_model.set_adapter(["default", "other"])  # pyright: ignore
    both = logits(model)
    model.merge_adapter(["default"])
    assert_close(logits(model), one)
    model.merge_adapter(["other"])
    assert_close(logits(model), both)
    model.unmerge_adapter()
    assert_close(logits(model), both)


def test_untied_models_keep_their_weights_where_they_are() -> None:
    for config in (OURS["diablo"], OURS["lori"], PEFTS["lora"]):
        model = trained(base(tied=False), config)
        layer: Any = model.get_submodule("base_model.model.lm_head")
        before = layer.base_layer
        untie(model)
        model.merge_adapter()
        assert layer.base_layer is before


METHOD = Method("m", "m", "adapter", {})


@pytest.mark.parametrize("name", [*OURS, *PEFTS])
def test_from_experiments_every_method_is_merged_and_saved_right(name: str, tmp_path: Path) -> None:
    model = trained(base(), {**OURS, **PEFTS}[name])
    expected = logits(model)
    methods.save(METHOD, model, tmp_path / "adapter", {})
    for folded in (False, True):
        loaded: Any = methods.load(METHOD, base(), tmp_path / "adapter", merge=folded).eval()
        nn.Module.to(loaded, torch.float64)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)  # A and B are loaded in float32
    assert_merged(loaded, logits(loaded), tmp_path / "merged")


# Initialisations that change the weight

STARTS: dict[str, PeftConfig] = {
    "milora": MiloraConfig(r=2, lora_alpha=2, **HEAD),
    "pissa": LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", **HEAD),
    "olora": LoraConfig(r=2, lora_alpha=2, init_lora_weights="olora", **HEAD),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_out_of_a_shared_weight_is_refused(name: str) -> None:
    message = r"^lm_head shares its weight \(model\.embed_tokens\.weight and lm_head\.weight\), which this method"
    with torch.device("meta"):
        empty = base(dtype=torch.float32)
    for model in (empty, base(dtype=torch.float32)):
        with pytest.raises(ValueError, match=message):
            check_start(model, STARTS[name])
    if name == "milora":
        with pytest.raises(ValueError, match=message):
            get_peft_model(base(dtype=torch.float32), STARTS[name])
    check_start(base(tied=False), STARTS[name])
    check_start(base(), LoraConfig(**HEAD))


@pytest.mark.parametrize("name", ["pissa", "milora", "lora_ga"])
def test_it_is_found_when_planning(name: str) -> None:
    (config,) = plan([f"method={name}", "method.adapter.target_modules=[q_proj,lm_head]"])
    with torch.device("meta"):
        empty = base(dtype=torch.float32)
    with pytest.raises(UserError, match=rf"^{name}-r\d+ on llama: lm_head shares its weight"):
        methods.attach(config.method, empty)


@pytest.mark.parametrize("name", STARTS)
def test_on_an_untied_output_layer_such_a_start_is_saved_for_the_unchanged_weight(name: str, tmp_path: Path) -> None:
    """PEFT saves the weights of adapted output layers with the adapter, which would be the changed ones."""
    model: Any = get_peft_model(base(tied=False, dtype=torch.float32), STARTS[name])
    initial = initial_factors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    expected = logits(model.eval())
    save_adapter(model, tmp_path, initial)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(base(tied=False, dtype=torch.float32), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-3, rtol=1e-4)


# On a quantised base


def test_a_quantised_base_with_an_adapted_output_layer_is_merged_and_saved_right(tmp_path: Path) -> None:
    """The decoder layers are quantised; the output layer is tied and not quantised."""

    def fresh() -> PreTrainedModel:
        model = llama(tie_word_embeddings=True)
        for name, linear in decoder_linears(model).items():
            set_module(model, name, QuantizedLinear.from_weight(round_to_nearest(linear.weight, 4, 16)))
        return model

    for number, config in enumerate((LoraConfig(r=2, target_modules=["lm_head"]), OURS["lori"])):
        model = trained(fresh(), config)
        expected = logits(model)
        folder = tmp_path / str(number)
        methods.save(METHOD, model, folder / "adapter", {})
        loaded: Any = methods.load(METHOD, fresh(), folder / "adapter", merge=True)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
        assert loaded.config.tie_word_embeddings is False
    merged = merge_to_grid(trained(fresh(), LoraConfig(r=2, target_modules=["lm_head"]))).model
    on_grid = logits(merged)  # quantised layers were not adapted, so nothing is lost
    torch.testing.assert_close(on_grid, logits(trained(fresh(), LoraConfig(r=2, target_modules=["lm_head"]))))
    save_quantized(merged, tmp_path / "grid")
    torch.testing.assert_close(logits(load_quantized(tmp_path / "grid")), on_grid)


# A whole run: scored, merged and exported


def test_a_run_is_scored_and_merged_as_the_model_it_trained(small: list[str], tmp_path: Path) -> None:
    """`tiny` is tied: LoRA on its output layer, through training, scoring's loading, vLLM's folder and `merge`."""
    from eval.backends import load
    from experiments.models.load import load_base
    from experiments.runs.config_files import read_config
    from experiments.runs.records import trained_record
    from experiments.train.run import train

    run = planned(
        [*small, "method=lora", "method.adapter.target_modules=[q_proj,lm_head]", "recipe.learning_rate=3e-2"]
    )
    train(run)
    config = read_config(run)
    unmerged: Any = methods.load(config.method, load_base(config)[0], run.adapter, merge=False)
    expected = logits(unmerged)
    assert not torch.allclose(expected, logits(load_base(config)[0]), atol=1e-2)
    scored = load(config, run, trained_record(run), allow_identity=False)
    torch.testing.assert_close(logits(scored.model), expected, atol=1e-4, rtol=1e-4)
    scored.model.save_pretrained(tmp_path / "export")
    merge(run, tmp_path / "merged", to_grid=False)
    for folder in ("export", "merged"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_loaded_with_the_heads_it_was_trained_with(tied: bool, tmp_path: Path) -> None:
    method = Method("full", "full", "all", None)
    model: Any = methods.attach(method, base(tied, torch.float32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    methods.save(method, model, tmp_path, {})
    loaded: Any = methods.load(method, base(tied, torch.float32), tmp_path, merge=True)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
