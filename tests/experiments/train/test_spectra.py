"""The theory's condition, measured in training runs (experiments/train/spectra.py)."""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file

from analysis.load import load_spectra, records
from analysis.plots_theory import condition_measured
from analysis.report import write_report
from analysis.theory import condition
from diablo import DiabloConfig
from experiments.config import Spectra
from experiments.errors import UserError
from experiments.runs.records import read_lines
from experiments.train.run import train
from experiments.train.spectra import TOLERANCE, MeasureSpectra, spectrum, trained_layers
from tests.analysis.analysis_runs import LAYERS, MODULES, write_run, write_spectra
from tests.conftest import planned
from tests.diablo.blocks.test_diablo_tuner import tiny_llama
from tests.experiments.train.test_run import train_until

SETTINGS = Spectra(every=2, blocks=4, tokens=1000)


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@given(
    tokens=st.integers(1, 40),
    blocks=st.integers(1, 4),
    width=st.integers(1, 6),
    rank=st.integers(1, 30),
    decay=st.integers(0, 12),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
@example(tokens=5, blocks=4, width=5, rank=5, decay=0, dtype=torch.float64, seed=2)  # a block's condition is over 1e3
@example(tokens=20, blocks=4, width=6, rank=6, decay=8, dtype=torch.float64, seed=0)  # and here over 1e8
@example(tokens=20, blocks=4, width=6, rank=6, decay=8, dtype=torch.float32, seed=0)
def test_against_the_definitions(
    tokens: int, blocks: int, width: int, rank: int, decay: int, dtype: torch.dtype, seed: int
) -> None:
    """Against numpy on the same rounded matrix; the `rank` directions of X decay to 10^-decay of the first."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(tokens, rank)), generator.normal(size=(rank, blocks * width))
    rounded = torch.tensor(factors[0] * np.logspace(0, -decay, rank) @ factors[1]).to(dtype)
    found = spectrum(rounded, blocks)
    x = rounded.double().numpy()
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    assert found["stable_rank"] == pytest.approx(squares.sum() / squares[0])
    assert found["energy"] == pytest.approx(squares[:width].sum() / squares.sum())
    for number, part in enumerate(np.split(x, blocks, axis=1)):
        own = np.linalg.svd(part, compute_uv=False)
        assert found["block_stable_rank"][number] == pytest.approx((own**2).sum() / own[0] ** 2)
        energy = (own[: max(1, width // 4)] ** 2).sum() / (own**2).sum()
        assert found["block_energy"][number] == pytest.approx(energy)
        inside = part @ np.linalg.lstsq(part, x, rcond=TOLERANCE[dtype])[0]
        condition = own[0] / own[own > TOLERANCE[dtype] * own[0]].min()  # amplifies float64 rounding errors
        assert found["covered"][number] == pytest.approx((inside**2).sum() / squares.sum(), abs=1e-14 * condition)
        assert found["covered"][number] <= found["energy"] + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_an_input_adds_nothing_to_a_blocks_column_space(dtype: torch.dtype) -> None:
    """The first block has rank 2 and covers two of eight directions; rounded it has rank 16 of 40."""
    generator = np.random.default_rng(0)
    x = torch.tensor(generator.normal(size=(40, 8)) @ generator.normal(size=(8, 64)))
    x[:, :16] = x[:, :2] @ torch.tensor(generator.normal(size=(2, 16)))
    exact, rounded = spectrum(x, 4), spectrum(x.to(dtype), 4)
    assert torch.linalg.matrix_rank(x.to(dtype)[:, :16].double()) == 16
    assert exact["covered"][0] < 0.5
    assert rounded["covered"] == pytest.approx(exact["covered"], abs=1e-3)


def test_where_the_condition_holds_every_block_covers_all_of_it() -> None:
    generator = np.random.default_rng(0)
    low, high = (generator.normal(size=(60, rank)) @ generator.normal(size=(rank, 32)) for rank in (8, 9))
    assert [condition(x, 4) for x in (low, high)] == [True, False]  # blocks of width 8
    held, broken = (spectrum(torch.tensor(x), 4) for x in (low, high))
    assert held["energy"] == pytest.approx(1)
    assert held["covered"] == pytest.approx([1] * 4)
    assert max(broken["covered"]) < broken["energy"] < 1


def test_bf16_and_zeros() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    x[:, :3] = 0
    found = spectrum(x.bfloat16(), 4)
    assert np.isnan(found["block_stable_rank"][0])
    assert found["covered"][0] == 0
    assert min(found["covered"][1:]) > 0


def step(measure: MeasureSpectra, model: torch.nn.Module, number: int, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Make the callback calls of one optimizer step as Trainer does."""
    about: Any = (None, SimpleNamespace(global_step=number), None)
    measure.on_step_begin(*about)
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    measure.on_pre_optimizer_step(*about)


def test_what_is_measured_makes_the_gradient_of_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """g_Y^T X over all tokens; padding, which has no gradient, is left out."""
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor, blocks: int) -> dict[str, Any]:
        seen.append(x)
        return spectrum(x, blocks)

    monkeypatch.setattr("experiments.train.spectra.spectrum", keep)
    model = tiny_llama()
    layers = trained_layers(model)
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    measure = MeasureSpectra(model, tmp_path / "spectra.jsonl", SETTINGS)
    step(measure, model, 0, ids, mask)
    (line,) = read_lines(tmp_path / "spectra.jsonl")
    assert (line["step"], line["tokens"]) == (1, 15)
    assert list(line["layers"]) == list(layers)
    assert (
        line["layers"]["model.layers.0.self_attn.q_proj"]["X"] == line["layers"]["model.layers.0.self_attn.k_proj"]["X"]
    )
    down = layers["model.layers.0.mlp.down_proj"]
    pairs = [(x, g) for x, g in itertools.pairwise(seen) if (g.shape[1], x.shape[1]) == down.weight.shape]
    assert any(torch.allclose(g.T @ x, down.weight.grad, atol=1e-6) for x, g in pairs)  # pyright: ignore
    assert not any(layer._forward_hooks for layer in layers.values())


def test_only_every_so_many_steps_and_only_so_many_tokens(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), DiabloConfig(num_blocks=4, target_modules=["q_proj", "down_proj"]))
    measure = MeasureSpectra(model, tmp_path / "spectra.jsonl", replace(SETTINGS, tokens=5))
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    for number in range(4):
        step(measure, model, number, ids, torch.ones_like(ids))
    lines = list(read_lines(tmp_path / "spectra.jsonl"))
    assert [(line["step"], line["tokens"]) for line in lines] == [(1, 5), (3, 5)]
    assert {name.rpartition(".")[2] for name in lines[0]["layers"]} == {"q_proj", "down_proj"}
    assert all(set(sides) == {"X", "g_Y"} for sides in lines[0]["layers"].values())


def test_a_run_writes_them_resumes_them_and_is_not_changed(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*small, "method=diablo", "spectra.every=4", "spectra.tokens=64", "recipe.adapter_dropout=0.1"]
    arguments += ["runtime.checkpoint_every=3"]
    whole, plain = planned(arguments), planned([*arguments, "spectra.every=null"])
    assert whole.root.name != plain.root.name
    assert train(whole).final_loss == train(plain).final_loss
    adapters = [load_file(run.adapter / "adapter_model.safetensors") for run in (whole, plain)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    lines = [{**line, "seconds": 0} for line in read_lines(whole.spectra)]
    assert [line["step"] for line in lines] == [1, 5, 9, 13]
    assert not plain.spectra.exists()
    shutil.rmtree(whole.root)
    broken = planned(arguments)
    train_until(broken, 11, monkeypatch)
    assert train(broken).resumed_at == [9]
    assert [{**line, "seconds": 0} for line in read_lines(broken.spectra)] == lines


def test_bad_settings_are_one_line(small: list[str], fails_with: Callable[[Callable[[], object]], str]) -> None:
    def trained(*arguments: str) -> str:
        return fails_with(lambda: train(planned([*small, "method=diablo", "spectra.every=4", *arguments])))

    assert "spectra.blocks=7: X of model.layers.0.self_attn.q_proj in step 1: 7 blocks do not divide" in trained(
        "spectra.blocks=7"
    )
    assert "spectra.tokens=0: it must be a whole number of at least 1" in trained("spectra.tokens=0")
    assert "no linear layer is trained" in trained("method=prompt")


def test_a_row_for_each_step_layer_and_side(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with pytest.raises(UserError, match=r"spectra\.jsonl"):
        load_spectra(run)
    write_spectra(run, steps=2, blocks=3)
    frame = load_spectra(run)
    assert len(frame) == 2 * LAYERS * len(MODULES) * 2
    row = records(frame)[-1]
    assert (row["step"], row["layer"], row["module"], row["side"]) == (2, LAYERS - 1, "down_proj", "g_Y")
    assert (row["blocks"], row["stable_rank"], row["energy"]) == (3, 4.0, 0.9)
    assert (row["covered_least"], row["covered_most"]) == pytest.approx((0.2, 0.6))
    assert row["covered"] == pytest.approx(1.4 / 3)


def test_the_figure_and_the_report_show_the_first_and_the_last_measurement(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", items=[1, 0])
    write_spectra(run, steps=5)
    picture = condition_measured("spectra", "A run", load_spectra(run))
    assert "Faint: step 1, 64 tokens; full: step 5, 64 tokens" in picture.caption
    assert len(picture.figure.axes) == 6
    for axes in picture.figure.axes:
        drawn = [line for line in axes.lines if len(line.get_xdata()) == LAYERS]  # pyright: ignore
        assert len(drawn) == 2 * len(MODULES)
    page = write_report([run], tmp_path / "report", None, "One run").read_text(encoding="utf-8")
    assert "Spectra of inputs and gradients" in page
    assert list((tmp_path / "report" / "figures").glob("spectra_*.png"))
    write_spectra(run, steps=0)
    assert "nothing was measured" in write_report([run], tmp_path / "report", None, "One run").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_it_costs_less_than_a_twentieth_of_training(small: list[str]) -> None:
    """At the interval and size of experiment=spectra_tiny, by the training's own timing."""
    run = planned(
        [
            *small,
            "method=diablo",
            "spectra.every=30",
            "recipe.batch_size=16",
            "recipe.micro_batch_size=16",
            "task.data.train=1456",
            "recipe.epochs=2",
        ]
    )
    record = train(run)
    seconds = [line["seconds"] for line in read_lines(run.spectra)]  # the first one also warms up
    assert len(seconds) * statistics.median(seconds) < 0.05 * record.train_seconds
