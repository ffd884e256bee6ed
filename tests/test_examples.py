"""The scripts in examples/, each run as a user runs it: on the tiny base model, and on SmolLM2."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples import rows
from experiments import ROOT
from experiments.models.full_precision import base_path
from experiments.plan.compose import plan
from tests.conftest import SMALL

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "rows")
SMALL_RUN = ["--rows", "48", "--num-blocks", "4", "--learning-rate", "1e-2"]
FURTHER = {"quantized_base": ["--group-size", "32"]}  # 64 does not divide the tiny model's sides


@pytest.fixture(scope="module")
def tiny(cache_dir: Path) -> Path:
    (config,) = plan([*SMALL, "method=base", f"runtime.cache_dir={cache_dir}"])
    return Path(base_path(config))


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a script in this process, where imports cost nothing, and return what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        rows.run(importlib.import_module(f"examples.{name}").main)
    return capsys.readouterr().out


def losses(printed: str) -> tuple[float, float]:
    (found,) = re.findall(r"held-out loss (\S+) before, (\S+) after", printed)
    return float(found[0]), float(found[1])


def adapters(folder: Path) -> set[str]:
    return {str(PeftConfig.from_pretrained(str(path.parent)).peft_type) for path in folder.rglob("adapter_config.json")}


def test_the_trainer_script_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("trainer", capsys, "--out", str(tmp_path))
    assert "10 … 19 goes on with 20" in printed
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "import diablo" in (tmp_path / "README.md").read_text(encoding="utf-8")
    before, after = losses(printed)
    assert after < before - 0.5


def test_the_trainer_script_refuses_what_it_would_ignore(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run("trainer", capsys, "--num-blocks", "7")
    assert "error: --num-blocks needs --model" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_the_tiny_model_and_saves_an_adapter(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    printed = run(name, capsys, "--model", str(tiny), "--out", str(out), *SMALL_RUN, *FURTHER.get(name, []))
    assert adapters(out) == {"DIABLO"}
    if name not in ("several_adapters", "trl_dpo"):  # which result is right is more than the tiny model can learn
        before, after = losses(printed)
        assert after < before
    for file in out.rglob("adapter_model.safetensors"):
        assert all(tensor.abs().max() > 0 for tensor in load_file(file).values())
        assert "import diablo" in file.with_name("README.md").read_text(encoding="utf-8")


def test_a_script_takes_rows_of_ones_own(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    sums = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
    arguments = ("--model", str(tiny), "--out", str(tmp_path / "out"), *SMALL_RUN, "--data", str(file))
    assert "0+1=" in run("trainer", capsys, *arguments)  # the first row is held out, and answered at the end
    file.write_text(json.dumps(sums[0]), encoding="utf-8")
    with pytest.raises(SystemExit, match="more rows than its 1 are needed: 16 are held out"):
        run("trainer", capsys, *arguments)


MISTAKES = [
    (
        ["--model", "no/such"],
        "error: --model no/such: neither a folder with a config.json nor a hub id that can be loaded",
    ),
    (["--model", "TINY", "--data", "nosuch.jsonl"], "error: --data nosuch.jsonl: no such file"),
    (["--model", "TINY", "--data", "README.md"], "error: README.md, line 1: not of the form "),
    (["--model", "TINY", "--num-blocks", "0"], "error: --rows 160 --num-blocks 0: both must be at least 1"),
    (["--model", "TINY", "--num-blocks", "7"], "num_blocks=7 does not divide in_features=96 and out_features=96"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
@pytest.mark.parametrize("name", ["trainer", "trl_sft"])  # one makes the adapter itself, trl the other's
def test_a_mistake_is_one_line(
    name: str,
    arguments: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    given = [str(tiny) if argument == "TINY" else argument for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        run(name, capsys, "--out", str(tmp_path), *given)
    said = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)  # 2: argparse's
    assert message in said.splitlines()[-1]


def test_sizes_of_a_quantised_base_that_do_not_divide_are_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*group_size"):
        run("quantized_base", capsys, "--model", str(tiny), "--out", str(tmp_path), "--group-size", "64")


def test_bitsandbytes_is_a_base_too(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install bitsandbytes")
    # On the CPU it needs sides divisible by 64, which those of `tiny` are not.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=720, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    arguments = ("--model", str(tmp_path / "base"), "--out", str(tmp_path), *SMALL_RUN, "--base", "bitsandbytes")
    printed = run("quantized_base", capsys, *arguments)
    before, after = losses(printed)
    assert after < before
    assert adapters(tmp_path) == {"DIABLO"}


@pytest.mark.real
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_on_smollm2(name: str, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(name, capsys, "--model", str(smollm2), "--out", str(tmp_path / "out"), "--rows", "16")
    assert adapters(tmp_path / "out") == {"DIABLO"}
    if name == "several_adapters":
        assert "[mean of both]" in printed
    else:
        before, after = losses(printed)
        assert after < before
