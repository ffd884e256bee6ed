"""Sizes by layer in a method's label; the checks themselves are tested with the values that they refuse."""

from __future__ import annotations

import pytest

from experiments.plan.compose import plan, resolve, resolve_with_hydra
from experiments.plan.counting import count
from experiments.plan.overrides import sweep


@pytest.mark.parametrize(
    ("size", "label"),
    [
        ("16", "diablo-N16"),
        ("{q_proj: 8, v_proj: 16}", "diablo-Nq8+v16"),
        ("{model.layers.0.self_attn.q_proj: 8}", "diablo-Nmodel.layers.0.self_attn.q8"),
        ("{" + ", ".join(f"model.layers.{n}.self_attn.q_proj: 8" for n in range(4)) + "}", "diablo-N4sizes"),
    ],
)
def test_sizes_by_layer_have_a_label(size: str, label: str) -> None:
    (config,) = plan([f"method.adapter.num_blocks={size}", "method.adapter.target_modules=[q_proj,v_proj]"])
    assert config.method.label == label
    assert f"-{label}-" in config.run_id


def test_a_run_with_sizes_by_layer_is_planned_as_hydra_would_and_counted() -> None:
    arguments = ["method.adapter.num_blocks={q_proj: 8, v_proj: 16}", "method.adapter.target_modules=[q_proj,v_proj]"]
    (overrides,) = sweep(arguments)
    config = resolve(overrides)
    assert config == resolve_with_hydra(overrides)
    assert count(config).trainable == 4 * (96 * 96 // 8 + 96 * 48 // 16)
