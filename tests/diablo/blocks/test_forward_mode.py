"""The forward mode of a layer, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diablo import DiabloConfig, DiabloLinear
from tests.diablo.blocks.test_diablo_tuner import adapted, attach, tiny_llama


@pytest.mark.parametrize(
    ("base", "settings", "mode"),
    [
        (nn.Linear(64, 32), {"num_blocks": 2}, "in_place"),
        (nn.Linear(64, 16), {"num_blocks": 2}, "adapter"),  # blocks of 32 × 8
        (nn.Linear(64, 32), {"num_blocks": 2, "dropout": 0.1}, "adapter"),
        (nn.Linear(64, 65), {"num_blocks": 2, "allow_uneven": True}, "adapter"),
        (nn.Linear(64, 32), {"num_blocks": 2, "mode": "adapter"}, "adapter"),
        (nn.Linear(64, 16), {"num_blocks": 2, "mode": "in_place"}, "in_place"),
        (nn.Linear(64, 32, device="meta"), {"num_blocks": 2}, "adapter"),
    ],
)
def test_auto_takes_in_place_where_it_can_be_had(base: nn.Module, settings: dict, mode: str) -> None:
    layer = DiabloLinear(base, "default", DiabloConfig(**settings))
    assert layer.forward_mode == {"default": mode}
    assert layer.in_weight == ("default" if mode == "in_place" else None)


def test_a_weight_that_other_modules_share_is_left_alone() -> None:
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    model = attach(tied, target_modules=["lm_head"], num_blocks=2)
    assert [layer.forward_mode["default"] for layer in adapted(model).values()] == ["adapter"]
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(
        ValueError, match=r"lm_head: mode='in_place' cannot be used with a base weight that other modules"
    ):
        attach(tied, target_modules=["lm_head"], mode="in_place")


def test_two_active_adapters_are_added_from_the_side_in_auto_and_refused_in_place() -> None:
    for mode in ("auto", "in_place"):
        model: Any = attach(tiny_llama(), mode=mode, init_weights=False, num_blocks=2)
        model.add_adapter("other", DiabloConfig(num_blocks=2, target_modules=["q_proj"], init_weights=False))
        layer = adapted(model)["base_model.model.model.layers.0.self_attn.q_proj"]
        x = torch.randn(3, 32)
        with model.disable_adapter():
            frozen = layer.base_layer(x)
        expected = frozen + sum(x @ layer.get_delta_weight(name).T for name in ("default", "other"))
        if mode == "auto":
            model.base_model.set_adapter(["default", "other"])
            torch.testing.assert_close(layer(x), expected)
        else:
            with pytest.raises(ValueError, match=r"default, other cannot be active at once.*mode='adapter'"):
                model.base_model.set_adapter(["default", "other"])


class Quantised(Tensor):
    pass


def quantised_linear() -> nn.Linear:
    base = nn.Linear(4, 4, bias=False)
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Quantised), requires_grad=False)
    return base


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (
            nn.Linear(4, 4),
            {"dropout": 0.1},
            r"mode='in_place' cannot drop .*: set mode='adapter' or dropout=0, not 0.1",
        ),
        (quantised_linear(), {}, "base layer that is quantised .*: use mode='adapter'"),
        (nn.Linear(4, 4, device="meta"), {}, "base weight on the meta device.*: use mode='adapter'"),
        (nn.Linear(4, 4), {"mode": "inplace"}, "mode='inplace': choose 'auto', 'adapter' or 'in_place'"),
    ],
)
def test_what_cannot_be_trained_in_place_is_refused(base: nn.Module, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DiabloLinear(base, "default", DiabloConfig(num_blocks=2, **{"mode": "in_place", **settings}))
    assert "\n" not in str(caught.value)
