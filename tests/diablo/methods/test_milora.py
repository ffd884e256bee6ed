"""MiLoRA's initialisation, and saving adapters that change the base as plain LoRA."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from diablo import DiabloConfig, MiloraConfig
from diablo.methods.milora import smallest_triplets
from diablo.methods.residual import changes_base, initial_factors, save_adapter
from tests.diablo.blocks.test_diablo_tuner import tiny_llama

TARGETS = ["q_proj", "k_proj", "down_proj"]


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))


COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}

PISSA: dict[str, Any] = COMMON | {"init_lora_weights": "pissa"}


def milora(**settings: Any) -> MiloraConfig:
    return MiloraConfig(**(COMMON | settings))


def pissa(**settings: Any) -> LoraConfig:
    return LoraConfig(**(PISSA | settings))


def attach(base: nn.Module, config: PeftConfig) -> PeftModel:
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(model, PeftModel)
    return model


def train(model: PeftModel) -> None:
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        adam.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        adam.step()


# MiLoRA's initialisation


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_factors_are_the_smallest_triplets(shape: tuple[int, int], scaling: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b = smallest_triplets(weight, 3, scaling)
    assert a.shape == (3, shape[1])
    assert b.shape == (shape[0], 3)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    part = (u[:, -3:] * s[-3:]) @ vt[-3:]
    torch.testing.assert_close(scaling * (b @ a).double(), part, rtol=1e-5, atol=1e-5)
    # both factors carry the same share, sqrt(S / s), of each triplet
    torch.testing.assert_close(a.norm(dim=1).double(), (s[-3:] / scaling).sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.norm(dim=0).double(), (s[-3:] / scaling).sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 16}, {"use_rslora": True}])
def test_attaching_moves_the_smallest_triplets_out_of_the_base(settings: dict) -> None:
    base = tiny_llama()
    before = base(tokens()).logits
    model = attach(base, milora(**settings))
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-5 * before.abs().max().item())
    name = "model.layers.0.self_attn.k_proj"
    original = tiny_llama().get_submodule(name).weight
    residual = model.get_base_model().get_submodule(name).base_layer.weight  # pyright: ignore
    assert isinstance(original, Tensor)
    s, left = torch.linalg.svdvals(original), torch.linalg.svdvals(residual)
    torch.testing.assert_close(left[:-4], s[:-4], rtol=1e-4, atol=1e-5)  # the large ones are kept
    assert left[-4:].max() < 1e-5 < 0.01 < s[-4:].min()  # the small ones are removed


def test_a_bf16_base_keeps_its_outputs_to_its_own_rounding() -> None:
    base = tiny_llama(torch.bfloat16)
    before = base(tokens()).logits.float()
    model = attach(base, milora())
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert (model(tokens()).logits.float() - before).abs().max() < 0.05 * before.abs().max()


def test_only_the_factors_train() -> None:
    model = attach(tiny_llama(), milora())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_on_the_meta_device_only_the_structure_is_made() -> None:
    with torch.device("meta"):
        base = tiny_llama()
    model = attach(base, milora())
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * (64 + 48 + 80)


def test_saved_unconverted_it_finds_the_same_start_on_loading(tmp_path: Path) -> None:
    model = attach(tiny_llama(), milora())
    train(model)
    model.save_pretrained(str(tmp_path))
    expected = model(tokens()).logits
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert isinstance(loaded.peft_config["default"], MiloraConfig)
        torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' must be True"),
        ({"use_dora": True}, "use_dora=True must be False"),
        ({"lora_bias": True}, "lora_bias=True must be False"),
        ({"target_parameters": ["weight"]}, r"target_parameters=\['weight'\] must be unset"),
    ],
)
def test_other_starts_and_layers_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        milora(**settings)


def test_a_rank_beyond_the_weight_s_is_refused_with_the_numbers() -> None:
    message = r"^model\.layers\.0\.self_attn\.k_proj: r=20 exceeds the 16 singular values of a \(16, 32\) weight"
    with pytest.raises(ValueError, match=message):
        attach(tiny_llama(), milora(r=20, target_modules=["k_proj"]))


def test_a_base_without_plain_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama()
    projection = base.get_submodule("model.layers.0.self_attn.q_proj")
    projection.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    message = r"q_proj: MiLoRA needs an nn\.Linear that is not quantised, not Linear: load the base"
    with pytest.raises(ValueError, match=message):
        attach(base, milora(target_modules=["q_proj"]))
    # bitsandbytes can store its 4-bit codes in a float tensor, recognised only through PEFT's own list of backends
    monkeypatch.setattr("diablo.methods.milora.resolve_quantization_backend", lambda layer: object())
    with pytest.raises(ValueError, match=message):
        attach(tiny_llama(), milora(target_modules=["q_proj"]))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not Embedding"):
        attach(tiny_llama(), milora(target_modules=["embed_tokens"]))


# Saving adapters that changed the base


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (milora(), True),
        (pissa(), True),
        (pissa(init_lora_weights="pissa_niter_4"), True),
        (pissa(init_lora_weights="olora"), True),
        (pissa(init_lora_weights=True), False),
        (pissa(init_lora_weights="gaussian"), False),
        (DiabloConfig(num_blocks=4, target_modules=TARGETS), False),
    ],
)
def test_changes_base_says_whether_attaching_changed_a_base_weight(config: PeftConfig, changed: bool) -> None:
    model = attach(tiny_llama(), config)
    original = tiny_llama().state_dict()
    now = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().state_dict().items()}
    assert any(not torch.equal(now[name], weight) for name, weight in original.items()) == changed
    assert changes_base(config) == changed
    assert bool(initial_factors(model)) == changed


CONVERTED = [
    milora(),
    milora(use_rslora=True),
    milora(lora_dropout=0.1, modules_to_save=["lm_head"]),
    milora(rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 12}),
    milora(rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 12}, use_rslora=True),
    pissa(),
    pissa(init_lora_weights="pissa_niter_16", use_rslora=True),
    pissa(init_lora_weights="olora", lora_alpha=8),
]


@pytest.mark.parametrize("config", CONVERTED)
def test_the_saved_adapter_is_plain_lora_for_the_unchanged_base(config: LoraConfig, tmp_path: Path) -> None:
    model = attach(tiny_llama(), config)
    initial = initial_factors(model)
    train(model)
    model.eval()
    expected = model(tokens()).logits
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.peft_config["default"].to_dict()
    save_adapter(model, tmp_path, initial)

    # the live model is unchanged, bit for bit
    assert live.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"].to_dict() == settings
    assert list(model.peft_config) == ["default"]

    saved = PeftConfig.from_pretrained(str(tmp_path))
    assert type(saved) is LoraConfig
    assert saved.r == 8
    assert saved.init_lora_weights is True
    base = tiny_llama()
    assert not torch.allclose(base(tokens()).logits, expected, atol=0.05)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("config", [DiabloConfig(num_blocks=4, target_modules=TARGETS), pissa(init_lora_weights=True)])
def test_other_methods_are_saved_as_peft_saves_them(config: PeftConfig, tmp_path: Path) -> None:
    model = attach(tiny_llama(), config)
    train(model)
    save_adapter(model, tmp_path / "ours", initial_factors(model))
    model.save_pretrained(str(tmp_path / "peft"))
    for name in ("adapter_config.json", "README.md"):
        assert (tmp_path / "ours" / name).read_text(encoding="utf-8") == (tmp_path / "peft" / name).read_text(
            encoding="utf-8"
        )
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("config", [milora(), DiabloConfig(num_blocks=4, target_modules=TARGETS)])
def test_the_file_is_readable_as_the_umask_says(config: PeftConfig, tmp_path: Path) -> None:
    model = attach(tiny_llama(), config)
    before = os.umask(0o027)
    try:
        save_adapter(model, tmp_path, initial_factors(model))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "adapter_model.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize("initial", [None, {}])
def test_saving_without_the_starting_factors_is_refused(initial: dict | None, tmp_path: Path) -> None:
    model = attach(tiny_llama(), milora())
    with pytest.raises(ValueError, match=r"initial factors of 12 of 12 tensors are missing: pass what initial_factors"):
        save_adapter(model, tmp_path, initial)


def test_saving_dora_on_a_changed_base_is_refused(tmp_path: Path) -> None:
    model = attach(tiny_llama(), pissa(use_dora=True))
    with pytest.raises(ValueError, match="use_dora=True and an initialisation that changes the base"):
        save_adapter(model, tmp_path, initial_factors(model))
