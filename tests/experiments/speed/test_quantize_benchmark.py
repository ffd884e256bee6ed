"""The benchmark of quantised models at a small size: it measures what it reports."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from diablo.quantize import gptq
from experiments.speed.quantized import main
from experiments.speed.quantized_models import plain_gptq


def test_the_plain_loop_is_gptq() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 256), torch.randn(512, 256)
    gram = inputs.T @ inputs
    ours = gptq(weight, gram, 4, -1)
    plain = plain_gptq(Namespace(bits=4, group_size=-1), "q_proj", weight, gram)
    assert torch.equal(ours.scales, plain.scales)
    # The order of summation differs, which occasionally changes a code halfway between two.
    assert (ours.codes == plain.codes).float().mean() > 0.995


@pytest.mark.slow
def test_the_command_measures_all_suites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIABLO_CACHE", str(cache_dir))
    main(["--small", "--rounds", "2", "--samples", "2", "--length", "32", "--tokens", "64", "--rank", "8",
          "--out", str(tmp_path)])  # fmt: skip
    assert capsys.readouterr().out.strip() == str(tmp_path / "quantize_benchmark.md")
    result = json.loads((tmp_path / "quantize_benchmark.json").read_text(encoding="utf-8"))
    assert {row["entry"] for row in result["quantise"]} == {
        *("activations", "rtn", "nf", "gptq", "magr", "loftq", "gptq, plain loop", "apiq, one epoch")
    }
    assert all(row["weights"] == 4 * 128**2 + 3 * 128 * 256 for row in result["quantise"])
    ratios = {row["entry"]: row["ratio_to_full_precision"] for row in result["step"]}
    assert [ratio for entry, ratio in ratios.items() if entry.endswith("full precision")] == [1, 1, 1]
    assert [row["tokens"] for row in result["step"]] == [64] * 6
    (memory,) = result["memory"]
    # 2 layers of 163,840 weights at 4 + 24/64 bits; fp16: these, embeddings and output layer of 512 × 128, five norms
    # of 128, and 2 × 16 rotary frequencies of the same type.
    assert memory["bits_per_weight"] == 4.375
    assert memory["fp16_bytes"] == 2 * (2 * 163840 + 512 * 128 + 5 * 128 + 2 * 16)
    assert memory["packed_bytes"] == 2 * 163840 * 4.375 / 8 + memory["fp16_bytes"] - 2 * 2 * 163840 + 2 * 2 * 16
    errors = {(row["method"], row["bits"], row["layer"]): row["error"] / row["size"] for row in result["errors"]}
    assert len(errors) == 4 * 3 * 4 * 7  # methods, bits, decoder layers, linear layers
    for bits in (2, 3, 4):
        sums = {
            method: sum(e for (m, b, _), e in errors.items() if (m, b) == (method, bits)) for method in ("rtn", "gptq")
        }
        assert sums["gptq"] < sums["rtn"]
    assert sum(e for (_, b, _), e in errors.items() if b == 4) < sum(e for (_, b, _), e in errors.items() if b == 2)
    assert memory["peak_bytes"] > memory["packed_bytes"]
    text = (tmp_path / "quantize_benchmark.md").read_text(encoding="utf-8")
    assert "| magr |" in text
    assert "4 bits, gptq not below rtn in " in text
    assert "bits per quantised weight" in text
