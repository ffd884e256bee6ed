"""A pytest plugin that turns PEFT's own test matrices on DiabloConfig.

PEFT's tests are parametrised over lists of cases at module level. Before collection the plugin puts DiaBlo's cases into
those same lists, once per forward mode, and after it keeps only the tests that got a DiaBlo case: none of PEFT's own
methods is tested again. A test whose case has a mode says so in the report, as the property `mode`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from pathlib import Path

import jinja2
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from diablo import DiabloConfig

# The custom models' layers: lin0 is 10 → 20, lin1 is 20 → 2.
CUSTOM_MODEL_CASES = [
    ("MLP regex", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": "lin0"}),
    ("MLP list", "MLP", DiabloConfig, {"num_blocks": 5, "target_modules": ["lin0"]}),
    ("MLP narrow output", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": ["lin1"]}),
    ("MLP both", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": ["lin0", "lin1"]}),
    ("MLP one block", "MLP", DiabloConfig, {"num_blocks": 1, "target_modules": ["lin0", "lin1"]}),
    (
        "MLP uneven",
        "MLP",
        DiabloConfig,
        {"num_blocks": 3, "target_modules": ["lin0", "lin1"], "allow_uneven": True},
    ),
    (
        "MLP modules_to_save",
        "MLP",
        DiabloConfig,
        {"num_blocks": 2, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    ("MLP dropout", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": ["lin0"], "dropout": 0.1}),
    ("Conv1D", "EmbConv1D", DiabloConfig, {"num_blocks": 1, "target_modules": ["conv1d"]}),
]


def _pair(name: str, first: dict, second: dict) -> tuple:
    common = {"init_weights": False, "num_blocks": 2}
    return (name, "diablo", DiabloConfig, {**common, **first}, {**common, **second})


TWO_ADAPTER_CASES = [
    _pair("DiaBlo same layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    _pair("DiaBlo other layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    _pair("DiaBlo other N", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "num_blocks": 5}),
]

# Llama's grouped-query projections are rectangular, GPT-2's layers are Conv1D. With two blocks mode "auto" trains
# Llama's q_proj and down_proj in place, and k_proj, whose blocks are narrow, from the side.
DECODER_TARGETS = {"tiny-llama": ["q_proj", "k_proj", "down_proj"], "tiny-conv1d": ["c_attn", "c_proj"]}
DECODER_CASES = [
    (DiabloConfig, {"task_type": "CAUSAL_LM", "num_blocks": 2, "target_modules": targets})
    for targets in DECODER_TARGETS.values()
]

# They read a checkpoint of another method from the hub; nothing of them depends on the method under test.
NEED_THE_HUB = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")


def _decoder_models() -> list[str]:
    """Two tiny models on disk, in place of the hub's."""
    # The folder's name must not contain "gpt2": PEFT's tests skip Conv1D by the model's name.
    folder = Path(os.environ["PEFT_MATRICES_MODELS"])
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    llama.save_pretrained(folder / "tiny-llama")
    conv1d = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    conv1d.save_pretrained(folder / "tiny-conv1d")
    return [str(folder / "tiny-llama"), str(folder / "tiny-conv1d")]


def _stub_diffusers() -> None:
    # The shared test base imports one class of it, for tests that are not run here.
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["diffusers"] = stub


MODES = ("auto", "adapter", "in_place")


def _can_be_forced(mode: str, settings: dict) -> bool:
    """Bad input for mode "in_place": dropout, and a layer that is no `nn.Linear`."""
    refused = settings.get("dropout") or settings["target_modules"] in (["conv1d"], DECODER_TARGETS["tiny-conv1d"])
    return mode != "in_place" or not refused


def _in_all_modes(cases: list[tuple]) -> list[tuple]:
    """The cases with each forward mode in their settings. Those of one mode stand together."""
    return [
        tuple({**part, "mode": mode} if isinstance(part, dict) else part for part in case)
        for mode in MODES
        for case in cases
        if all(_can_be_forced(mode, part) for part in case if isinstance(part, dict))
    ]


def _mode(params: dict) -> str | None:
    """The forward mode of a test's case; PEFT's tests of a config class alone have none."""
    return next((value["mode"] for value in params.values() if isinstance(value, dict) and "mode" in value), None)


def _names_fit(params: dict) -> bool:
    """Whether the targets are those of the model, where PEFT's tests cross models with configs."""
    if Path(params.get("model_id", "")).name not in DECODER_TARGETS:
        return True
    return params["config_kwargs"]["target_modules"] == DECODER_TARGETS[Path(params["model_id"]).name]


def _compile_templates_once() -> None:
    """Every `save_pretrained` writes a model card, whose template huggingface_hub compiles anew."""
    jinja2.Environment.compile = functools.lru_cache(jinja2.Environment.compile)  # pyright: ignore


def pytest_configure(config: pytest.Config) -> None:
    _stub_diffusers()
    _compile_templates_once()
    models = _decoder_models()
    cases = {
        "tests.test_custom_models": {
            "TEST_CASES": _in_all_modes(CUSTOM_MODEL_CASES),
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _in_all_modes(TWO_ADAPTER_CASES),
            "ALL_PEFT_CONFIG_CLASSES": [DiabloConfig],
        },
        "tests.test_decoder_models": {
            "PEFT_DECODER_MODELS_TO_TEST": models,
            "ALL_CONFIGS": _in_all_modes(DECODER_CASES),
        },
        "tests.test_config": {"LAYER_INDEXING_CONFIG_CLASSES": [(DiabloConfig, {})]},
    }
    for module_name, lists in cases.items():
        module = importlib.import_module(module_name)
        for name, ours in lists.items():
            getattr(module, name)[:] = ours  # in place: the tests' marks hold these very lists
    # ALL_CONFIG_CLASSES is a tuple, so the marks that hold it are rewritten instead.
    config_tests = sys.modules["tests.test_config"]
    for test in vars(config_tests.TestPeftConfig).values():
        marks = getattr(test, "pytestmark", [])
        for index, mark in enumerate(marks):
            if len(mark.args) == 2 and mark.args[1] is config_tests.ALL_CONFIG_CLASSES:
                marks[index] = pytest.mark.parametrize(mark.args[0], [(DiabloConfig, {})]).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and any(value is DiabloConfig for value in item.callspec.params.values())
        and not (item.path.name == "test_config.py" and item.originalname in NEED_THE_HUB)
        and _names_fit(item.callspec.params)
    ]
    for item in ours:
        item.user_properties.append(("mode", _mode(item.callspec.params)))
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
