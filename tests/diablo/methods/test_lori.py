"""LoRI: A is frozen, all or the largest entries of B are trained, and adapters are saved as plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from diablo import LoriConfig
from diablo.methods.lori import choose_entries, largest_entries
from diablo.methods.residual import save_adapter
from experiments.plan.compose import plan
from experiments.plan.counting import count
from tests.diablo.methods.test_milora import COMMON, attach, tiny_llama, tokens, train

LAYER = "base_model.model.model.layers.1.mlp.down_proj"  # B is (32, 4)


def lori(**settings: Any) -> LoriConfig:
    return LoriConfig(**(COMMON | settings))


def dense(seed: int = 5, **settings: Any) -> PeftModel:
    base = tiny_llama()
    torch.manual_seed(seed)
    return attach(base, lori(**settings))


def sparse(first: Path, seed: int = 5, **settings: Any) -> PeftModel:
    base, config = tiny_llama(), lori(**({"sparsity": 0.9} | settings))
    choose_entries(base, config, None, first)
    torch.manual_seed(seed)
    return attach(base, config)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """Return the folder of a trained LoRI-D adapter."""
    model = dense()
    train(model)
    save_adapter(model, tmp_path / "first", {})
    return tmp_path / "first"


def test_the_largest_entries_over_all_factors_are_kept_and_ties_with_them() -> None:
    factors = {"a": torch.tensor([[1.0, -5.0], [2.0, 0.5]]), "b": torch.tensor([[3.0], [-3.0]])}
    for sparsity, kept in ((0.5, {"a": [1], "b": [0, 1]}), (0.6, {"a": [1], "b": [0, 1]}), (0.8, {"a": [1], "b": []})):
        found = largest_entries(factors, sparsity)  # k = 3, 2 and 1 of 6
        assert {name: entries.tolist() for name, entries in found.items()} == kept


def test_what_cannot_be_chosen_is_said_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"only 1 of 4 entries of B differ from zero, sparsity=0\.5 keeps 2"):
        largest_entries({"a": torch.tensor([[0.0, 1.0, 0.0, 0.0]])}, 0.5)
    with pytest.raises(ValueError, match=r"sparsity=0\.9 leaves none of 4 entries"):
        largest_entries({"a": torch.ones(1, 4)}, 0.9)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="values that are NaN or infinite"):
            largest_entries({"a": torch.tensor([[1.0, 2.0, 3.0, value]])}, 0.5)


def test_a_is_loras_and_frozen() -> None:
    model, base = dense(), tiny_llama()
    torch.manual_seed(5)
    lora = attach(base, LoraConfig(**COMMON))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in lora.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    train(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_B" in name}
    model.set_adapter("default")  # does not unfreeze it
    assert {name for name, p in model.named_parameters() if p.requires_grad} == changed


def test_lori_s_is_lori_d_with_the_gradient_outside_the_mask_zero(first: Path) -> None:
    """By definition and by the authors' optimizer: the same initial A, B = 0, masked gradients, Adam."""
    small, whole = sparse(first), dense()
    factors = {name: tensor for name, tensor in load_file(first / "adapter_model.safetensors").items() if "_B" in name}
    sizes = torch.cat([tensor.abs().flatten() for tensor in factors.values()]).sort(descending=True).values
    total = 2 * 4 * (32 + 16 + 32)
    assert sizes.numel() == total
    threshold = sizes[int((1 - 0.9) * total) - 1]
    masks = {name.replace(".weight", ".default.weight"): f.abs() >= threshold for name, f in factors.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == 63  # int(0.0999… × 640), as the authors count
    trained = [p for p in small.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 63
    adam = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        adam.zero_grad()
        whole(input_ids=tokens(), labels=tokens()).loss.backward()
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.grad *= masks[name]
        adam.step()
    train(small)
    for name, mask in masks.items():
        one = whole.get_parameter(name).detach()
        other = small.get_submodule(name.removesuffix(".weight")).weight
        assert isinstance(other, Tensor)
        assert not other[~mask].any()
        torch.testing.assert_close(other.detach(), one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(small(tokens()).logits, whole(tokens()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_the_saved_adapter_is_plain_lora(sparsity: float, settings: dict, tmp_path: Path) -> None:
    before = dense(**settings)
    train(before)
    save_adapter(before, tmp_path / "first", {})
    model = sparse(tmp_path / "first", sparsity=sparsity, **settings) if sparsity else before
    train(model)
    model.eval()
    expected = model(tokens()).logits
    save_adapter(model, tmp_path / "adapter", {})
    assert type(PeftConfig.from_pretrained(str(tmp_path / "adapter"))) is LoraConfig
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    assert torch.equal(loaded(tokens()).logits, expected)
    assert torch.equal(model(tokens()).logits, expected)  # the live model is unchanged
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(file) == 12
    factor = model.get_submodule(f"{LAYER}.lora_B.default").weight
    assert isinstance(factor, Tensor)
    assert torch.equal(file[f"{LAYER}.lora_B.weight"], factor)
    zeros = sum(int((tensor == 0).sum()) for name, tensor in file.items() if "lora_B" in name)
    total = sum(tensor.numel() for name, tensor in file.items() if "lora_B" in name)
    assert zeros == (total - int((1 - sparsity) * total) if sparsity else 0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("sparsity", [0.9, 0.997])
def test_pefts_own_files_hold_what_loading_needs(
    sparsity: float, low_cpu_mem_usage: bool, first: Path, tmp_path: Path
) -> None:
    model = sparse(first, sparsity=sparsity)
    train(model)
    expected = model.eval()(tokens()).logits
    model.save_pretrained(str(tmp_path / "plain"))
    loaded = PeftModel.from_pretrained(
        tiny_llama(), str(tmp_path / "plain"), is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded.eval()(tokens()).logits, expected)
    assert isinstance(loaded.peft_config["default"], LoriConfig)
    sizes = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (model, loaded)]
    assert sizes[0] == sizes[1] > 0
    before = loaded.get_submodule(f"{LAYER}.lora_B.default").entries
    train(loaded)
    assert not torch.equal(loaded.eval()(tokens()).logits, expected)
    assert torch.equal(loaded.get_submodule(f"{LAYER}.lora_B.default").entries, before)  # pyright: ignore
    save_adapter(loaded, tmp_path / "lora", {})
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)


def test_a_state_dict_holds_what_loading_needs(first: Path) -> None:
    model, other = sparse(first), sparse(first)
    train(model)
    for _, layer in other.named_modules():
        if hasattr(layer, "entries"):
            layer.entries = torch.zeros_like(layer.entries)  # pyright: ignore
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(tokens()).logits, model.eval()(tokens()).logits)


def test_a_trainers_checkpoint_is_resumed(first: Path, tmp_path: Path) -> None:
    def trained(folder: Path, steps: int, resume: bool) -> Tensor:
        model = sparse(first)
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
            lr_scheduler_type="constant", disable_tqdm=True, save_only_model=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens()] * 8
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)  # pyright: ignore
        return model.eval()(tokens()).logits

    whole = trained(tmp_path / "whole", 4, resume=False)
    trained(tmp_path / "parts", 2, resume=False)
    torch.testing.assert_close(trained(tmp_path / "parts", 4, resume=True), whole, rtol=0, atol=1e-6)


def test_a_config_without_its_files_says_what_is_missing(first: Path) -> None:
    config = sparse(first).peft_config["default"]
    with pytest.raises(RuntimeError, match="the trained entries of B are unknown"):
        attach(tiny_llama(), config)(tokens())


def test_layers_without_any_kept_entry_stay_as_they_are(first: Path) -> None:
    model = sparse(first, sparsity=0.997)  # 1 of 640
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sorted(sizes) == [0, 0, 0, 0, 0, 1]
    expected = model(tokens()).logits
    train(model)
    assert not torch.equal(model(tokens()).logits, expected)


def test_counts_are_those_of_the_tables() -> None:
    """LLaMA3-8B with 7 modules and r = 32: B only, r times the sum of a layer's output features times 32 layers."""
    modules = "task.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
    arguments = ["model=llama3_8b", "model.adapter_size.rank=32", "task=gsm8k", modules]
    (whole,), (few,) = (plan([*arguments, f"method={name}"]) for name in ("lori_d", "lori_s"))
    outputs = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
    assert count(whole).trainable == 32 * 32 * outputs == 44_040_192
    assert round(count(whole).percent, 3) == 0.548
    assert count(few).trainable == 4_404_019


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' must be True"),
        ({"use_dora": True}, "use_dora=True must be False"),
        ({"lora_bias": True}, "lora_bias=True must be False"),
        ({"target_parameters": ["weight"]}, r"target_parameters=\['weight'\] must be unset"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 must be a share of B's entries"),
    ],
)
def test_other_starts_and_layers_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lori(**settings)


def test_a_first_adapter_that_does_not_fit_is_refused(first: Path) -> None:
    with pytest.raises(ValueError, match=r"down_proj: B is \(32, 2\), and \(32, 4\) in the first run's adapter"):
        sparse(first, r=2)
    with pytest.raises(ValueError, match=r"up_proj: B is \(48, 4\), and none in the first run's adapter"):
        sparse(first, target_modules=["q_proj", "k_proj", "down_proj", "up_proj"])
    with pytest.raises(ValueError, match="target_modules: nothing matches no module of LlamaForCausalLM"):
        sparse(first, target_modules=["nothing"])
    with pytest.raises(ValueError, match=r"sparsity=0\.9 takes its entries from a trained LoRI-D adapter"):
        choose_entries(tiny_llama(), lori(sparsity=0.9), None, None)
    with pytest.raises(ValueError, match=r"q_proj: sparsity=0\.9 but no entries are chosen: call"):
        attach(tiny_llama(), lori(sparsity=0.9))
    with pytest.raises(ValueError, match=r"embed_tokens: LoRI adapts linear layers, not Embedding"):
        get_peft_model(tiny_llama(), lori(target_modules=["embed_tokens"]))
