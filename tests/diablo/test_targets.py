"""Names in a config must exist in the model: all our methods, PEFT's in `experiments`, real architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from diablo import (
    BottleneckConfig,
    DiabloConfig,
    LoriConfig,
    MiloraConfig,
    S2ftConfig,
    SmtConfig,
    SparseConfig,
    suggest_num_blocks,
)
from diablo.methods.lora_ga import estimate_gradients
from diablo.methods.lori import choose_entries
from diablo.methods.smt import choose_blocks
from diablo.targets import check_targets, expert_names
from experiments.errors import UserError
from experiments.models.shapes import empty_base
from experiments.plan.compose import plan
from experiments.train import methods
from tests.diablo.blocks.test_diablo_tuner import tiny_llama

OURS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "diablo": (DiabloConfig, {"num_blocks": 4}),
    "sparse": (SparseConfig, {"density": "1/4"}),
    "smt": (SmtConfig, {"block_size": 16, "num_blocks": 1, "blocks": {"model.layers.0.self_attn.q_proj": [[0, 0]]}}),
    "lori": (LoriConfig, {"r": 2}),
    "milora": (MiloraConfig, {"r": 2}),
    "bottleneck": (BottleneckConfig, {"bottleneck_size": 2}),
}
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
ARCHITECTURES: dict[str, Any] = {
    "phi3": Phi3Config(**COMMON),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, num_experts=4),
}


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def on_meta(architecture: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture])


def diablo(targets: Any, **settings: Any) -> DiabloConfig:
    return DiabloConfig(num_blocks=4, target_modules=targets, **settings)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", OURS)
def test_each_method_names_the_target_that_matches_nothing_and_the_nearest_ones(name: str, device: str) -> None:
    kind, settings = OURS[name]
    with torch.device(device):
        base = tiny_llama()
    with pytest.raises(
        ValueError,
        match=r"^target_modules: qproj matches no module of LlamaForCausalLM: did you mean q_proj( or \w+)*\?$",
    ):
        attach(base, kind(target_modules=["q_proj", "qproj"], **settings))
    assert not any("base_layer" in key for key, _ in base.named_modules())  # nothing was attached
    attach(base, kind(target_modules=["q_proj"], **settings))


def test_s2ft_takes_its_targets_from_its_shares() -> None:
    with pytest.raises(ValueError, match=r"^target_modules: v_proj matches no module of Phi3ForCausalLM: did you mean"):
        attach(on_meta("phi3"), S2ftConfig(v_ratio=0.5))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["self_attn.q_prj"]}, "self_attn.q_prj matches no module .* did you mean self_attn.q_proj"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["lmhead"]}, "exclude_modules: lmhead .* did you mean lm_head"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.head"},
        r"exclude_modules: \.\*\\\.head matches no module",
    ),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lmhead"]}, "modules_to_save: lmhead .* did you mean lm_head"),
    (
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["self_attn"]},
        r"exclude_modules: self_attn holds targets, which stay targets \(self_attn\.q_proj\): name these",
    ),
    ({"target_modules": "all-linear", "exclude_modules": ["layers.1"]}, r"layers\.1 holds targets.*'\.\*layers"),
    ({"target_modules": "*_proj"}, r"^'\*_proj' is not a regular expression \(nothing to repeat"),
    (
        {"target_modules": "q_proj"},
        r"target_modules='q_proj' is an expression for whole names .* give the list \['q_proj",
    ),
    ({"target_modules": r".*\.q_projj"}, r"target_modules: \.\*\\\.q_projj matches no module"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        "layers_to_transform: no target is in layer 2, they are in 0 to 1$",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": -1}, "no target is in layer -1, they are in 0 to 1$"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
        "no target is in layer 0, none has a number with layers_pattern='h'$",
    ),
    (
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [0]},
        "no target is in layer 0, none has a number$",  # a complete name, which PEFT matches in any layer
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
@pytest.mark.parametrize("kind", [DiabloConfig, LoraConfig])
def test_all_that_names_modules_is_checked(kind: type[Any], settings: dict[str, Any], message: str) -> None:
    sized = {"num_blocks": 4} if kind is DiabloConfig else {"r": 2}
    with torch.device("meta"):
        base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        check_targets(base, kind(**sized, **settings))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DiabloConfig(num_blocks={"q_proj": 4, "kproj": 2}, target_modules=["q_proj", "k_proj"]),
            "num_blocks: kproj is no target of LlamaForCausalLM: did you mean k_proj",
        ),
        (
            DiabloConfig(num_blocks={"q_proj": 4, "v_proj": 2}, target_modules=["q_proj"]),
            "num_blocks: v_proj is no target of LlamaForCausalLM: did you mean q_proj",
        ),
        (
            SmtConfig(block_size=16, target_modules=["q_proj"], blocks={"model.layers.7.self_attn.q_proj": [[0, 0]]}),
            r"blocks: model\.layers\.7\.self_attn\.q_proj is no target",
        ),
        (LoriConfig(target_modules=["q_proj"], rank_pattern={"kproj": 2}), "rank_pattern: kproj matches no target"),
        (MiloraConfig(target_modules=["q_proj"], alpha_pattern={"k": 2}), "alpha_pattern: k matches no target"),
        (
            LoraConfig(target_modules=[], target_parameters=["experts.down"]),
            "target_parameters: experts.down matches no parameter",
        ),
    ],
)
def test_settings_of_single_layers_are_checked(config: PeftConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_targets(tiny_llama(), config)


def test_what_is_left_out_on_purpose_is_no_mistake() -> None:
    cases: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": r".*\.(q_proj|c_attn)"},  # one expression for several architectures
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": "all-linear"},
        {"target_modules": None},
    ]
    for settings in cases:
        check_targets(tiny_llama(), DiabloConfig(num_blocks=4, **settings))
        attach(tiny_llama(), DiabloConfig(num_blocks=4, **settings))


def test_peft_names_two_heads_for_a_classifier_that_has_one() -> None:
    config = diablo(["q_proj"], task_type="SEQ_CLS")
    attach(LlamaForSequenceClassification(tiny_llama().config), config)
    assert set(config.modules_to_save or ()) == {"score", "classifier"}


def test_an_adapter_that_was_saved_with_such_a_name_is_loaded(tmp_path: Path) -> None:
    attach(tiny_llama(), diablo(["q_proj"])).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"q_proj"', '"q_proj", "c_attn"'), encoding="utf-8")
    PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_a_second_adapter_is_checked_and_refused_without_a_trace() -> None:
    model = attach(tiny_llama(), diablo(["q_proj"]))
    with pytest.raises(ValueError, match="target_modules: diablo_blocks matches no module"):
        model.add_adapter("other", diablo(["k_proj", "diablo_blocks"]))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", diablo(["q_proj", "k_proj"]))


def test_preparing_is_refused_before_it_costs_anything() -> None:
    def never() -> None:
        raise AssertionError("a gradient was asked for")

    base = tiny_llama()
    with pytest.raises(ValueError, match="target_modules: k matches no module"):
        choose_blocks(base, SmtConfig(target_modules=["q_proj", "k"], block_size=16, num_blocks=1), never)
    lora_ga = LoraConfig(target_modules=["q_proj", "k"], init_lora_weights=cast(Any, "lora_ga"))
    with pytest.raises(ValueError, match="target_modules: k matches no module"):
        estimate_gradients(base, lora_ga, never, iterations=1)
    with pytest.raises(ValueError, match="target_modules: k matches no module"):
        choose_entries(base, LoriConfig(target_modules=["q_proj", "k"], sparsity=0.5), None, None)
    with pytest.raises(ValueError, match="target_modules: k matches no module"):
        suggest_num_blocks(base, target_modules=["q_proj", "k"])


# Fused projections and experts


def test_fused_projections_are_linear_layers_of_other_names() -> None:
    with pytest.raises(ValueError, match="q_proj matches no module of Phi3ForCausalLM: did you mean qkv_proj"):
        attach(on_meta("phi3"), diablo(["q_proj", "o_proj"]))
    with pytest.raises(ValueError, match=r"up_proj matches no module of Phi3ForCausalLM: did you mean .*gate_up_proj"):
        attach(on_meta("phi3"), diablo(["up_proj"]))
    for targets in (["qkv_proj", "gate_up_proj"], "all-linear"):
        model = attach(AutoModelForCausalLM.from_config(ARCHITECTURES["phi3"]), diablo(targets))
        adapted = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}  # pyright: ignore
        assert adapted == (
            {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"} if targets == "all-linear" else {*targets}
        )


def test_the_names_that_experts_would_have() -> None:
    names = {name: {key.rpartition(".")[2] for key in expert_names(on_meta(name))} for name in ARCHITECTURES}
    qwen = {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}
    assert names == {
        "phi3": set(),
        "qwen3_moe": qwen,
        "qwen2_moe": qwen,
        "mixtral": {"w1", "w2", "w3", "gate_up_proj", "down_proj"},
    }
    convolution = nn.Sequential(nn.Conv1d(2, 3, 4))  # a 3-D parameter that is not an expert, as in Mamba
    assert expert_names(convolution) == []


INSIDE = [
    ("qwen3_moe", ["q_proj", "up_proj"], "experts.up_proj"),
    ("qwen3_moe", ["q_proj", "down_proj"], "experts.down_proj"),
    ("qwen3_moe", ["experts.gate_up_proj"], "experts.gate_up_proj"),
    ("qwen3_moe", r".*\.(q|down)_proj", "experts.down_proj"),
    ("qwen2_moe", ["up_proj"], "experts.up_proj"),  # it also matches the shared expert, a linear layer
    ("mixtral", ["q_proj", "w2"], "experts.w2"),
]


@pytest.mark.parametrize("config", [diablo, lambda targets, **more: LoraConfig(target_modules=targets, **more)])
@pytest.mark.parametrize(("architecture", "targets", "inside"), INSIDE)
def test_targets_inside_experts_are_refused_with_the_reason(
    config: Any, architecture: str, targets: Any, inside: str
) -> None:
    with pytest.raises(ValueError, match=f"matches {inside}: the experts of .* are 3-D parameters, not linear layers"):
        check_targets(on_meta(architecture), config(targets))
    with pytest.raises(
        ValueError, match=r"'all-linear' would leave out experts\.\w+, .* 3-D .*; name the target_modules one by one"
    ):
        check_targets(on_meta(architecture), config("all-linear"))
    check_targets(on_meta(architecture), config("all-linear", exclude_modules=".*experts.*"))


def test_what_is_beside_the_experts_is_trained() -> None:
    base = AutoModelForCausalLM.from_config(ARCHITECTURES["qwen2_moe"])
    model = attach(base, diablo(["q_proj", "shared_expert.up_proj"]))
    adapted: Any = model.base_model.targeted_module_names
    assert sorted({name.removeprefix("model.layers.0.") for name in adapted if ".layers.0." in name}) == [
        "mlp.shared_expert.up_proj",
        "self_attn.q_proj",
    ]
    with pytest.raises(ValueError, match=r"up_proj matches no module of MixtralForCausalLM: .*the experts of Mixtral"):
        check_targets(on_meta("mixtral"), diablo(["q_proj", "up_proj"]))


def test_other_names_for_another_architecture() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    attach(base, diablo(["c_attn"]))
    with pytest.raises(ValueError, match="q_proj matches no module of GPT2LMHeadModel: did you mean c_proj"):
        attach(base, diablo(["c_attn", "q_proj"]))


# From experiments


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "pissa", "lora_ga", "lori_d", "diablo", "sparse", "smt"])
def test_it_is_found_when_planning(name: str) -> None:
    (config,) = plan([f"method={name}", "method.adapter.target_modules=[q_proj,kproj,down_proj]"])
    base = empty_base(config.model.architecture)
    with pytest.raises(UserError, match=r"^[\w-]+ on llama: target_modules: kproj matches no module .* k_proj"):
        methods.attach(config.method, base)


def test_s2ft_on_fused_projections_is_found_when_planning() -> None:
    (config,) = plan(["method=s2ft", "+method.adapter.v_ratio=0.5"])
    base = on_meta("phi3")
    with pytest.raises(UserError, match=r"^s2ft-d[\d.]+ on phi3: target_modules: v_proj matches no module"):
        methods.attach(config.method, base)
