"""The benchmark runs every path on the CPU, counts the operations done, and its report reads its own JSON.

No time is asserted; the benchmark itself measures times, on an idle machine.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.errors import UserError
from experiments.runs.environment import peak_memory, reset_peak_memory
from experiments.speed import cases
from experiments.speed.layer_passes import _layer_pass
from experiments.speed.layers import main
from experiments.speed.report import ratio


def _product_into(_: Any, left: Any, right: Any, **__: Any) -> int:
    """PyTorch counts a product, but not one that adds into its result."""
    return 2 * math.prod(left) * right[-1]


# DoRA's norms are not matrix products, and the gradient of single entries need not be one.
NO_PRODUCTS = (cases.DORA, "random_entry", "banded")


@pytest.mark.parametrize(
    "label", [label for label in (*cases.LABELS, *cases.OTHER_PATTERNS) if label not in NO_PRODUCTS]
)
def test_the_operations_beside_each_time_are_those_that_pytorch_counts(label: str) -> None:
    tokens, m, n, num_blocks, rank = 24, 64, 96, 4, 8
    layer = cases.attach(label, nn.Sequential(nn.Linear(m, n, bias=False)), ["0"], num_blocks, rank, None).train()
    x, upstream = torch.randn(tokens, m, requires_grad=True), torch.randn(tokens, n)
    into: dict[Any, Any] = {torch.ops.aten.baddbmm_: _product_into, torch.ops.aten.addmm_: _product_into}
    with FlopCounterMode(display=False, custom_mapping=into) as counter:
        _layer_pass(layer, x, upstream)
    assert counter.get_total_flops() == cases.layer_cost(label, tokens, m, n, num_blocks, rank, 4).operations


def test_the_costs_are_the_formulas_of_the_docstring() -> None:
    t, m, n, num_blocks, r = 512, 4096, 1024, 64, 8
    cost = {label: cases.layer_cost(label, t, m, n, num_blocks, r, 2) for label in cases.LABELS}
    floor = 4 * t * m * n
    assert cost[cases.FLOOR].operations == floor
    assert cost[cases.FULL].operations == 1.5 * floor
    assert cost[cases.IN_PLACE].operations == floor + 2 * t * m * n / num_blocks
    assert cost[cases.ADAPTER].operations == floor + 6 * t * m * n / num_blocks
    assert cost[cases.LORA].operations == floor + 6 * t * r * (m + n)
    assert cost[cases.FLOOR].bytes == 2 * 2 * (t * m + t * n + m * n)
    assert cost[cases.IN_PLACE].bytes - cost[cases.FLOOR].bytes == 2 * t * (m + n) + 4 * m * n / num_blocks


def test_budgets_are_matched() -> None:
    assert cases.matched_rank([(4096, 4096)], 64) == 32
    base, trained = nn.Sequential(nn.Linear(64, 64, bias=False)), set()
    for label in (cases.LORA, cases.ADAPTER, cases.IN_PLACE, *cases.OTHER_PATTERNS):
        model = cases.attach(label, cases.sharing(base), ["0"], 4, 8, None)
        trained.add(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert trained == {1024}


def test_methods_share_one_base_and_not_its_flags() -> None:
    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    full = cases.attach(cases.FULL, cases.sharing(base), ["0"], 4, 8, None)
    floor = cases.attach(cases.FLOOR, cases.sharing(base), ["0"], 4, 8, None)
    (trained,), (frozen,) = full.parameters(), floor.parameters()
    assert trained.data_ptr() == frozen.data_ptr()
    assert (trained.requires_grad, frozen.requires_grad) == (True, False)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    megabyte = 2**20

    def work() -> None:
        for _ in range(3):
            first = torch.empty(2 * megabyte, dtype=torch.uint8)
            second = torch.empty(megabyte, dtype=torch.uint8)
            del first, second

    assert cases.peak_bytes(work, [], "cpu") == pytest.approx(3 * megabyte, rel=0.01)
    x, layer = torch.randn(256, 1024, requires_grad=True), nn.Linear(1024, 1024, bias=False)
    work_twice = partial(_layer_pass, layer, x, torch.randn(256, 1024))
    expected = 4 * (256 * 1024 * 2 + 1024 * 1024)  # output, dX and dW
    for _ in range(2):  # the second pass must not count the gradients of the first
        assert cases.peak_bytes(work_twice, [x, *layer.parameters()], "cpu") >= expected


@pytest.mark.slow
def test_one_command_writes_json_table_and_picture(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shapes", "64x64", "--tokens", "32", "--models", "tiny", "--num-blocks", "4"]
    main([*arguments, "--length", "16", "--rounds", "3", "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "benchmark.json", "benchmark.md", "benchmark.png", "benchmark.svg", "passes.png", "passes.svg",
    }  # fmt: skip
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))
    assert [len(result[suite]) for suite in ("layers", "models", "curve")] == [1, 1, 3]
    for suite, more in (("layers", set[str]()), ("models", {cases.RECOMPUTED})):
        (case,) = result[suite]
        assert set(case["entries"]) == {*cases.LABELS, *more}
        assert all(len(entry["seconds"]) == 3 for entry in case["entries"].values())
        assert ratio(case, cases.FLOOR) == (1.0, 1.0, 1.0)
    table = (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8")
    assert all(f"| {label} |" in table for label in (*cases.LABELS, cases.RECOMPUTED))
    entries = result["models"][0]["entries"]
    peaks = {label: entry["peak_bytes"] for label, entry in entries.items()}
    assert peaks[cases.FLOOR] <= peaks[cases.RECOMPUTED] < peaks[cases.IN_PLACE]
    before = table
    (tmp_path / "out" / "benchmark.md").unlink()
    main(["--redraw", str(tmp_path / "out" / "benchmark.json")])
    assert (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8") == before


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--authors-repo .*block_linear\.py does not exist: give a checkout"):
        main(
            [
                "--device",
                "cpu",
                "--suites",
                "layers",
                "--shapes",
                "8x8",
                "--num-blocks",
                "2",
                "--authors-repo",
                str(tmp_path),
            ]
        )
    with pytest.raises(UserError, match="DiaBlo adapter: 0: num_blocks=3 does not divide"):
        main(["--device", "cpu", "--suites", "layers", "--shapes", "8x8", "--tokens", "4", "--num-blocks", "3"])
    with pytest.raises(UserError, match=r"--models gpt: no file gpt\.yaml"):
        main(["--device", "cpu", "--suites", "models", "--models", "gpt", "--tokens", "8"])
    with pytest.raises(SystemExit):
        main(["--shapes", "8by8"])
    assert "write in_features x out_features" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak")
def test_a_peak_is_of_what_came_after_the_reset() -> None:
    held = np.ones(50_000_000)
    before = peak_memory("cpu")
    del held
    reset_peak_memory("cpu")
    after = peak_memory("cpu")
    assert before - after > 300_000_000
    again = np.ones(50_000_000)
    assert peak_memory("cpu") - after > 300_000_000
    del again
