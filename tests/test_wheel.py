"""The wheel: `diablo` alone, typed, in an environment that has its dependencies and nothing of the pipeline."""

from __future__ import annotations

import json
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from experiments import ROOT

PIPELINE = ("hydra", "omegaconf", "lm_eval", "antlr4", "wandb", "pandas", "matplotlib")
FOLDERS = ("experiments", "eval", "analysis", "slurm", "tests", "configs")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy of the clone, with all of its packages."""
    out, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("clone")
    for name in ("diablo", "experiments", "eval", "analysis", "slurm", "tests", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new environment with the wheel, and with ours but the pipeline's packages."""
    home, libraries = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("libraries")
    venv.create(home, symlinks=True)
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for folder in site.getsitepackages():
        for path in Path(folder).iterdir():
            if not path.name.lower().startswith(PIPELINE) and path.suffix != ".pth":
                (libraries / path.name).symlink_to(path)
    (packages / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", packages, wheel],
        check=True,
    )
    return home / "bin" / "python"


def test_it_holds_diablo_alone_with_its_types_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "diablo").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert "diablo/py.typed" in code
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_its_metadata(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("diablo-peft", project["version"])
    required = {re.split(r"[<>=]", text)[0] for text in metadata.get_all("Requires-Dist") or []}
    assert required == {"torch", "transformers", "peft", "safetensors"}
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])


def test_the_citation_has_the_package_s_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert citation["license"] == project["license"]


USE = """
import importlib.util, json, sys
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import diablo

def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                        num_attention_heads=2))

folder, *absent = sys.argv[1:]
model = get_peft_model(base(), diablo.DiabloConfig(num_blocks=4, task_type="CAUSAL_LM"))
rows = torch.arange(16).reshape(2, 8)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(input_ids=rows, labels=rows).loss.backward()
optimizer.step()
model.save_pretrained(folder)
logits = model.eval()(input_ids=rows).logits
loaded = PeftModel.from_pretrained(base(), folder).eval()
print(json.dumps({
    "equal": bool(torch.equal(loaded(input_ids=rows).logits, logits)),
    "changed": not torch.equal(base().eval()(input_ids=rows).logits, logits),
    "file": diablo.__file__,
    "found": [name for name in absent if importlib.util.find_spec(name)],
}))
"""


@pytest.mark.slow
def test_it_trains_saves_and_loads_without_the_pipeline(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-I", "-c", USE, str(tmp_path / "adapter"), *FOLDERS, *PIPELINE],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] == []
    assert Path(told["file"]).is_relative_to(python.parent.parent)
    assert told["changed"]
    assert told["equal"]


TYPED = """
from diablo import DiabloConfig, suggest_num_blocks

reveal_type(DiabloConfig(num_blocks=8, target_modules=["q_proj"]).num_blocks)
reveal_type(suggest_num_blocks)
DiabloConfig(num_block=8)
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_types(python: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(f"# pyright: strict\n{TYPED}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", python, "--outputjson", "user.py"],
        cwd=tmp_path, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    told = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [entry["message"] for entry in told if entry["severity"] == "information"]
    assert revealed[0] == 'Type of "DiabloConfig(num_blocks=8, target_modules=["q_proj"]).num_blocks" is ' + (
        '"int | dict[str, int]"'
    )
    assert revealed[1].endswith('-> dict[str, int]"')
    assert [entry["rule"] for entry in told if entry["severity"] == "error"] == ["reportCallIssue"]
