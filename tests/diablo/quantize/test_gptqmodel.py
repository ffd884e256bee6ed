"""GPTQ compared with gptqmodel, if installed: `make test-gptqmodel` installs it in a separate environment."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from diablo.quantize import gptq, grids
from tests.diablo.quantize.test_quantize_gptq import problem


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return gptqmodel's class for one layer, and its settings."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # its import fails with two CPUs
    module = pytest.importorskip("gptqmodel.quantization.gptq")
    return module.GPTQ, pytest.importorskip("gptqmodel.quantization.config").QuantizeConfig


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("sym", [False, True])
def test_the_same_weight_comes_out(
    theirs: Any, bits: int, group_size: int, sym: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scales in float32, as in gptqmodel, whose result is rounded to float16."""
    solver, settings = theirs
    weight, x, _ = (part.float() for part in problem())
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    about = {"desc_act": False, "act_group_aware": False, "damp_percent": 0.01, "damp_auto_increment": 0.0, "mse": 0.0}
    task = solver(layer, settings(bits=bits, group_size=group_size, sym=sym, **about))
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], None)
    expected = task.quantize()[0].float()
    monkeypatch.setattr(grids, "_stored", lambda scale: scale)
    found = gptq(weight, x.T @ x, bits, group_size, sym)
    assert (found.dequantize() - expected).abs().max() < 0.003  # one step of the finest grid is 0.02 and more
