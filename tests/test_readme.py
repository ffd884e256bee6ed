"""README: short, with links that lead somewhere, numbers that are the records', and a snippet that runs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

from experiments import ROOT
from experiments.plan.choose import stages_of
from experiments.plan.selection import Selection, select
from experiments.runs.records import read_json
from experiments.speed.cases import DORA, FLOOR, IN_PLACE, LORA
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
    assert f"in place takes {passes[IN_PLACE]} times the frozen model's pass, LoRA {passes[LORA]}, DoRA" in TEXT


def test_its_answers_are_the_evidences() -> None:
    with (ROOT / "results/evidence/comparisons.csv").open(encoding="utf-8") as file:
        found = {(row["question"], row["second"]): row for row in csv.DictReader(file) if row["first"] == "diablo-N24"}

    def number(question: str, second: str, key: str = "mean", digits: int = 3) -> str:
        return f"{abs(float(found[question, second][key])):.{digits}f}"

    rows = {row.split("|")[1].strip(): row for row in TEXT.splitlines() if row.startswith("| ")}
    matched = rows["Does it match low-rank methods?"]
    smallest = [number("a", second, "smallest") for second in ("lora-r14", "dora-r14")]
    assert f"where {smallest[0]} and {smallest[1]} nats would have shown" in matched
    assert f"PiSSA is {number('a', 'pissa-r14')} better" in matched
    for second in ("lora-r14", "dora-r14"):
        assert (found["a", second]["verdict"], found["a", second]["seeds"]) == ("cannot say", "5")
    full = rows["Does it match full fine-tuning?"]
    assert found["a", "full"]["verdict"] == found["a", "pissa-r14"]["verdict"] == "worse"
    assert f"{number('a', 'full')} nats worse ({number('a', 'full', 'low')} to {number('a', 'full', 'high')})" in full
    assert found["b", "sparse-permuted_block"]["verdict"] == "equal within 0.01"
    assert f"random blocks {number('b', 'sparse-random_block')} worse" in rows["Is the diagonal special?"]
    assert found["g", "lora-r14"]["verdict"] == "worse"
    assert f"{number('g', 'lora-r14', digits=2)} nats more than LoRA" in rows["Does it forget less?"]
    assert found["g", "pissa-r14"]["verdict"] == found["g", "full"]["verdict"] == "cannot say"


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
