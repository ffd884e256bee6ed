"""DiaBlo as a PEFT tuner: outputs, trained parameters, saved files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PeftType, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from diablo import DiabloConfig, DiabloLinear
from diablo.blocks.config import DIABLO
from diablo.blocks.products import delta_weight, num_parameters

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # k_proj and v_proj are 32 → 16
        initializer_range=0.2,  # large enough that every weight has a visible effect on every output
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    nn.Module.to(model, dtype)
    return model


def tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def attach(base: nn.Module, **settings) -> PeftModel:
    settings = {"num_blocks": 4, "target_modules": ALL_SEVEN, "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(base, DiabloConfig(**settings))  # pyright: ignore[reportArgumentType]


def adapted(model: nn.Module) -> dict[str, DiabloLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DiabloLinear)}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "diablo_" not in name}


def train(model: nn.Module, steps: int = 5) -> list[float]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    changed = [name for name in left if not torch.equal(left[name], right[name])]
    assert not changed


# What it computes


def test_attaching_changes_no_output() -> None:
    model = tiny_llama()
    before = model(tokens()).logits
    assert torch.equal(attach(model)(tokens()).logits, before)


@pytest.mark.parametrize("num_blocks", [1, 4, 8])
def test_gradient_of_the_blocks_is_the_diagonal_of_the_full_gradient(num_blocks: int) -> None:
    """The paper's key identity, through a whole model: dL/dD_i is the i-th diagonal block of dL/dW."""
    full = tiny_llama(torch.float64)
    full(input_ids=tokens(), labels=tokens()).loss.backward()
    model = attach(tiny_llama(torch.float64), num_blocks=num_blocks)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    layers = adapted(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        gradient = layer.diablo_blocks["default"].grad
        weight_gradient = full.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        assert gradient is not None
        assert isinstance(weight_gradient, Tensor)
        n, d_in, d_out = gradient.shape
        assert n == num_blocks
        assert gradient.abs().max() > 1e-6
        for i in range(n):
            # nn.Linear's weight is (out, in): rows are outputs
            block = weight_gradient[i * d_out : (i + 1) * d_out, i * d_in : (i + 1) * d_in].T
            torch.testing.assert_close(gradient[i], block, rtol=1e-10, atol=1e-10)


def test_trains_step_for_step_like_shira_with_a_block_diagonal_mask() -> None:
    """PEFT's SHiRA trains any fixed set of entries through a sparse tensor: an independent implementation."""

    def mask_of_blocks(base_layer: nn.Module, r: int, random_seed: int | None = None, **_: object) -> Tensor:
        assert isinstance(base_layer, nn.Linear)
        out_features, in_features = base_layer.weight.shape
        return delta_weight(torch.ones(4, in_features // 4, out_features // 4), in_features, out_features)

    # SHiRA counts r (in + out) entries, which must be in · out / N: 32 · 32 / 4 = 4 · (32 + 32).
    shira = ShiraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    shira.mask_fn = mask_of_blocks  # pyright: ignore[reportAttributeAccessIssue]
    theirs = get_peft_model(tiny_llama(), shira)
    ours = attach(tiny_llama(), target_modules=["q_proj", "o_proj"])
    assert train(ours, 20) == pytest.approx(train(theirs, 20), abs=1e-5)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        start = tiny_llama().get_submodule(name).weight
        assert (merged.get_submodule(name).weight - start).abs().max() > 0.05
        torch.testing.assert_close(
            merged.get_submodule(name).weight, expected.get_submodule(name).weight, rtol=0, atol=2e-5
        )


def test_grouped_query_attention_gets_rectangular_blocks() -> None:
    layers = adapted(attach(tiny_llama()))
    attention = "base_model.model.model.layers.0.self_attn."
    assert layers[attention + "q_proj"].diablo_blocks["default"].shape == (4, 8, 8)
    assert layers[attention + "k_proj"].diablo_blocks["default"].shape == (4, 8, 4)


def test_trainable_parameters_are_in_times_out_over_n() -> None:
    model = attach(tiny_llama())
    expected = 2 * sum(
        num_parameters(i, o, 4) for i, o in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    )
    assert model.get_nb_trainable_parameters()[0] == expected == 2 * (32 * 96 + 3 * 32 * 48) // 4


# What it trains


def test_training_lowers_the_loss_and_changes_no_base_parameter() -> None:
    model = attach(tiny_llama())
    before = base_weights(model)
    losses = train(model, 20)
    assert losses[-1] < 0.7 * losses[0]
    assert_same_bits(base_weights(model), before)
    assert all("diablo_blocks" in name for name, p in model.named_parameters() if p.requires_grad)


def test_blocks_stay_fp32_over_a_bf16_base() -> None:
    model = attach(tiny_llama(torch.bfloat16))
    assert {layer.diablo_blocks["default"].dtype for layer in adapted(model).values()} == {torch.float32}
    assert model(tokens()).logits.dtype == torch.bfloat16
    train(model)
    assert all(layer.diablo_blocks["default"].abs().max() > 0 for layer in adapted(model).values())


def test_autocast_runs_the_blocks_in_bf16_and_keeps_fp32_gradients() -> None:
    model = attach(tiny_llama(), init_weights=False)
    exact = model(tokens()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=tokens(), labels=tokens())
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    output.loss.backward()
    gradients = [layer.diablo_blocks["default"].grad for layer in adapted(model).values()]
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain, checkpointed = attach(tiny_llama()).train(), attach(tiny_llama()).train()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, layer in adapted(plain).items():
        gradient = adapted(checkpointed)[name].diablo_blocks["default"].grad
        assert layer.diablo_blocks["default"].grad is not None
        assert gradient is not None
        assert torch.equal(layer.diablo_blocks["default"].grad, gradient)


# Which layers


def test_all_linear_takes_every_linear_layer_but_the_head() -> None:
    names = {name.rpartition(".")[2] for name in adapted(attach(tiny_llama(), target_modules="all-linear"))}
    assert names == set(ALL_SEVEN)


def test_without_targets_llama_gets_the_paper_s() -> None:
    names = {name.rpartition(".")[2] for name in adapted(attach(tiny_llama(), target_modules=None))}
    assert names == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


def test_layers_can_be_chosen_and_modules_excluded() -> None:
    model = attach(tiny_llama(), layers_to_transform=[1], layers_pattern="layers", exclude_modules=["gate_proj"])
    names = set(adapted(model))
    assert {name.split("layers.")[1][0] for name in names} == {"1"}
    assert len(names) == 6
    assert not any("gate_proj" in name for name in names)


def test_modules_to_save_are_trained_in_full_and_saved(tmp_path: Path) -> None:
    model = attach(tiny_llama(), modules_to_save=["lm_head"])
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert not torch.equal(model.base_model.model.lm_head.weight, tiny_llama().lm_head.weight)  # pyright: ignore
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


# Saving, merging, several adapters


def test_saved_and_loaded_on_a_fresh_base_gives_the_same_outputs(tmp_path: Path) -> None:
    model = attach(tiny_llama(), dropout=0.1)
    train(model)
    model.eval().save_pretrained(str(tmp_path))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    expected = model(tokens()).logits
    assert not torch.allclose(expected, tiny_llama()(tokens()).logits, atol=1e-2)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(tokens()).logits, expected)
        settings = loaded.peft_config["default"].to_dict() | {"inference_mode": False}
        assert settings == model.peft_config["default"].to_dict()


def test_loads_through_auto_peft_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = attach(LlamaForCausalLM.from_pretrained(tmp_path / "base"), init_weights=False)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"num_blocks": 4}, {"num_blocks": 5, "allow_uneven": True}])
def test_unmerging_restores_every_bit(dtype: torch.dtype, settings: dict) -> None:
    model = attach(tiny_llama(dtype), init_weights=False, **settings)
    before = base_weights(model)
    unmerged = model(tokens()).logits
    model.merge_adapter()
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert not torch.equal(base_weights(model)[name], before[name])
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    scale = unmerged.abs().max().item()
    torch.testing.assert_close(model(tokens()).logits, unmerged, rtol=0, atol=tolerance * scale)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
    assert torch.equal(model(tokens()).logits, unmerged)


def test_merging_twice_changes_nothing_more() -> None:
    model = attach(tiny_llama(), init_weights=False)
    model.merge_adapter()
    once = base_weights(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same_bits(base_weights(model), once)


def test_merge_and_unload_gives_the_plain_architecture() -> None:
    model = attach(tiny_llama(), init_weights=False)
    expected = model(tokens()).logits
    merged = model.merge_and_unload()
    assert not adapted(merged)
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_add_up_switch_and_unmerge() -> None:
    model = attach(tiny_llama(), init_weights=False, target_modules=["q_proj"])
    model.add_adapter("other", DiabloConfig(num_blocks=8, target_modules=["q_proj", "v_proj"], init_weights=False))
    before = base_weights(model)
    layer = adapted(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 32)
    frozen = layer.get_base_layer()(x)
    deltas = {name: x @ layer.get_delta_weight(name).T for name in ("default", "other")}
    torch.testing.assert_close(layer(x), frozen + deltas["default"])
    model.set_adapter("other")
    torch.testing.assert_close(layer(x), frozen + deltas["other"])
    assert [name for name, p in model.named_parameters() if p.requires_grad and "other" not in name] == []
    model.base_model.set_adapter(["default", "other"])  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(layer(x), frozen + deltas["default"] + deltas["other"])
    model.merge_adapter()
    torch.testing.assert_close(layer(x), frozen + deltas["default"] + deltas["other"])
    with model.disable_adapter():
        model(tokens())  # PEFT's convention: the next forward pass unmerges merged adapters
        assert torch.equal(layer(x), frozen)
    assert_same_bits(base_weights(model), before)


def test_the_name_stands_in_for_a_peft_type(tmp_path: Path) -> None:
    assert DIABLO == "DIABLO" == DIABLO.value == DIABLO.name
    assert "DIABLO" not in PeftType.__members__  # once PEFT has it, peft_type() uses PEFT's
    DiabloConfig(num_blocks=2, target_modules=["a"]).save_pretrained(str(tmp_path))
    assert '"peft_type": "DIABLO"' in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 0}, "num_blocks=0 must be a whole number of at least 1"),
        ({"num_blocks": 6.5}, "num_blocks=6.5 must be a whole number"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1 must be"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, r"layers_to_transform=\[0\] .*'all-linear'"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern='layers' has no effect"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern='layers' needs layers_to_tr"),
    ],
)
def test_bad_settings_are_refused_with_their_value(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiabloConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_blocks": 5},
            r"^model\.layers\.0\.self_attn\.q_proj: num_blocks=5 does not divide in_features=32 and out_features=32; "
            r"nearest values that divide both: 4 and 8",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            r"^model\.embed_tokens: DiaBlo adapts linear layers, not Embedding: remove it from target_modules$",
        ),
        (
            {"target_modules": ["attention"]},
            r"^target_modules: attention matches no module of LlamaForCausalLM: known: ",
        ),
    ],
)
def test_unfit_targets_are_refused_in_one_line_that_says_where(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attach(tiny_llama(), **settings)
    assert "\n" not in str(caught.value)
