"""The architecture of a base model of one's own: what is no config of transformers is told as one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from experiments import CONFIGS
from experiments.models.shapes import USUAL, USUAL_TYPES, build_config, check_architecture, empty_base

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
Fails = Callable[[Callable[[], object]], str]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_sise": 32},
            "model.architecture.hidden_sise: LlamaConfig has no such field: did you mean hidden_size",
        ),
        ({"rms_norm_epsilon": 1}, "model.architecture.rms_norm_epsilon: LlamaConfig has no such field: did you mean"),
        ({"model_type": "qwen9"}, "model.architecture.model_type=qwen9: no model type of transformers: did you mean"),
        ({"model_type": "@"}, "model.architecture.model_type=@: no model type of transformers: none of the"),
        (
            {"num_key_value_heads": 3},
            "model.architecture.num_key_value_heads=3: it does not divide num_attention_heads",
        ),
    ],
)
def test_a_mistake_is_told_when_planning(change: dict[str, Any], message: str, fails_with: Fails) -> None:
    for check in (check_architecture, build_config):
        assert fails_with(lambda check=check: check({**LLAMA, **change})).startswith(message)


def test_a_name_that_only_other_models_have_is_refused(fails_with: Fails) -> None:
    said = fails_with(lambda: build_config({**LLAMA, "model_type": "gpt2", "num_key_value_heads": 4}))
    assert said.startswith("model.architecture.num_key_value_heads: GPT2Config has no such field")


@pytest.mark.parametrize("kind", sorted(USUAL_TYPES))
def test_what_is_not_looked_up_when_planning_is_there(kind: str) -> None:
    known = build_config({"model_type": kind})
    assert [name for name in USUAL if not hasattr(known, name)] in ([], ["head_dim"])


@pytest.mark.parametrize("change", [{"hidden_act": 3}, {"rope_parameters": {"rope_type": "linear"}}])
def test_what_transformers_refuses_is_one_line(change: dict[str, Any], fails_with: Fails) -> None:
    assert fails_with(lambda: build_config({**LLAMA, **change})).startswith("model.architecture: ")


def test_older_names_of_fields_are_read() -> None:
    assert build_config({**LLAMA, "rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5  # pyright: ignore[reportAttributeAccessIssue]
    assert build_config({"model_type": "gpt2", "hidden_size": 32, "n_layer": 2}).num_hidden_layers == 2


def test_only_causal_language_models_are_built(fails_with: Fails) -> None:
    said = fails_with(lambda: empty_base({"model_type": "t5"}))
    assert said.startswith("model.architecture.model_type=t5: transformers has no causal language model of this type")


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_architectures_pass(path: Any) -> None:
    build_config(yaml.safe_load(path.read_text(encoding="utf-8"))["architecture"])
