"""README: short, with links that lead somewhere, numbers that are the records', and a snippet that runs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

from analysis.evidence_against import findings
from analysis.evidence_runs import settings_of
from analysis.evidence_spectra import answer
from analysis.load import find_runs, load_runs, load_spectra
from experiments import ROOT
from experiments.plan.choose import stages_of
from experiments.plan.selection import Selection, select
from experiments.runs.records import read_json
from experiments.speed.cases import DORA, FLOOR, IN_PLACE, LORA, RECOMPUTED
from experiments.speed.report import ratio

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 20
    missing = [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


def test_its_figures_of_speed_are_the_records() -> None:
    (case,) = read_json(ROOT / "results/gpu_h200/benchmark.json")["models"]
    passes = {label: f"{ratio(case, label)[0]:.2f}" for label in (IN_PLACE, LORA, DORA)}
    step = f"{ratio(case, IN_PLACE, 'step_seconds')[0]:.2f}"
    peaks = [f"{case['entries'][label]['peak_bytes'] / 1e9:.1f}" for label in (IN_PLACE, LORA, FLOOR)]
    assert (
        f"{passes[IN_PLACE]} of its pass and {step} of a step over all of LLaMA2-7B's shapes on an H200, "
        f"where LoRA takes {passes[LORA]} and DoRA {passes[DORA]}; "
        f"{peaks[0]} GB beyond the weights, LoRA {peaks[1]}, the frozen model {peaks[2]}."
    ) in TEXT
    (case,) = read_json(ROOT / "results/gpu_h200/recomputed.json")["models"]
    recomputed, peak = f"{ratio(case, RECOMPUTED)[0]:.2f}", f"{case['entries'][RECOMPUTED]['peak_bytes'] / 1e9:.1f}"
    assert case["entries"][RECOMPUTED]["peak_bytes"] == case["entries"][FLOOR]["peak_bytes"]
    assert f"`recompute_inputs=True` {recomputed} of the pass at the frozen model's {peak} GB." in TEXT
    method = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    assert f"an H200 {recomputed} instead of {passes[IN_PLACE]}, at its {peak} GB beyond the weights" in method
    assert f"in place takes {passes[IN_PLACE]} times the frozen model's pass, LoRA {passes[LORA]}, DoRA" in TEXT


def test_its_answers_are_the_evidences() -> None:
    with (ROOT / "results/evidence/comparisons.csv").open(encoding="utf-8") as file:
        found = {(row["question"], row["first"], row["second"]): row for row in csv.DictReader(file)}

    def one(question: str, second: str, first: str = "diablo-N24") -> dict[str, str]:
        row = found[question, first, second]
        assert row["seeds"] == "5"
        return row

    def number(row: dict[str, str], key: str = "mean", digits: int = 3) -> str:
        return f"{abs(float(row[key])):.{digits}f}"

    rows = {row.split("|")[1].strip(): row for row in TEXT.splitlines() if row.startswith("| ")}
    matched = rows["Does it match low-rank methods?"]
    lora, dora, pissa, milora = (one("a", f"{name}-r14") for name in ("lora", "dora", "pissa", "milora"))
    found_often = f"({number(lora, 'smallest')} and {number(dora, 'smallest')} would be found four times in five)"
    assert f"{number(lora)} nats from LoRA and DoRA {found_often}" in matched
    assert f"PiSSA is {number(pissa)} better, but not after" in matched
    assert number(dora) == "0.000"
    assert {row["verdict"] for row in (lora, dora, pissa, milora)} == {"cannot say"}
    small = {name: one("a", f"{name}-r4", "diablo-N96") for name in ("lora", "dora", "pissa", "milora")}
    least, *_, most = sorted(number(row) for row in small.values())
    assert f"With 0.54 % all four are {least} to {most} better, for certain only PiSSA" in matched
    assert {name for name, row in small.items() if row["verdict"] == "worse"} == {"pissa"}
    assert all(float(row["low"]) > 0 for row in small.values())
    full = one("a", "full")
    assert full["verdict"] == "worse"
    told = f"{number(full)} nats worse ({number(full, 'low')} to {number(full, 'high')})"
    assert told in rows["Does it match full fine-tuning?"]
    patterns = {name: one("b", f"sparse-{name}") for name in ("permuted_block", "random_row", "random_entry")}
    assert {row["verdict"] for row in patterns.values()} == {"equal within 0.01"}
    block, column = (one("b", f"sparse-random_{name}") for name in ("block", "column"))
    assert (
        f"random blocks {number(block)} worse; random columns are {number(column)} worse"
        in rows["Is the diagonal special?"]
    )
    for ours, theirs, said in (
        ("diablo-N24", "r14", "more than LoRA with N=24"),
        ("diablo-N96", "r4", "less with N=96"),
    ):
        row = one("g", f"lora-{theirs}", ours)
        assert row["verdict"] == "cannot say"
        assert f"{number(row, digits=2)} " + ("nats " if "more" in said else "") + said in rows["Does it forget less?"]
    settings = settings_of(load_runs(find_runs([ROOT / "results/evidence/runs"]), quiet=True))
    (forgotten,) = (row for row in findings(settings, []) if row.registered.startswith("At an equal gain"))
    (equal,) = re.findall(r"(N\d+) − lora-r\d+ −(\d\.\d{3}) \([^)]*\), equal gain", forgotten.numbers)
    assert f"an equal gain, {equal[0].replace('N', 'N=')}, {float(equal[1]):.2f} less" in rows["Does it forget less?"]
    shares = re.findall(r"([\d.]+) % of the", answer(load_spectra(next((ROOT / "results/evidence/spectra").iterdir()))))
    told = "one block covers {:.0f} % of a layer's inputs and {:.0f} % of its gradients".format(*map(float, shares))
    assert told in rows["Does the theory's condition hold?"]


def test_its_count_of_the_papers_runs_is_the_plans() -> None:
    ((known, following),) = re.findall(r"the paper's Table 1: (\d+) \+ (\d+) runs", TEXT)
    selected = select(["experiment=commonsense"], Selection(paper=True))
    found = stages_of(selected.configs, selected.by)
    assert (len(found.known()), len(found.following())) == (int(known), int(following))


def test_the_dry_run_that_it_shows_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.plan.__main__ import main

    (command,) = [line for line in TEXT.splitlines() if "--dry-run   # runs, parameters, memory" in line]
    main(command.partition("  #")[0].split()[3:])
    printed = capsys.readouterr().out.splitlines()
    shown = TEXT.partition("The first prints")[2].split("```")[1].strip().splitlines()
    assert len(shown) == 5
    assert all(line in printed for line in shown if line != "…")


@pytest.mark.real
def test_its_snippet_runs_on_real_weights(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert name in snippet
    monkeypatch.chdir(tmp_path)
    before, train, after = snippet.partition("# … train as before")
    assert train
    values: dict[str, object] = {}
    exec(before.replace(name, str(smollm2)), values)
    model = values["model"]
    assert isinstance(model, torch.nn.Module)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.01 < trained / sum(p.numel() for p in model.parameters()) <= 0.05
    ids = torch.arange(1, 33)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(input_ids=ids).logits
    exec(train + after, values)
    merged = values["merged"]
    assert isinstance(merged, torch.nn.Module)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
