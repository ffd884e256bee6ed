"""The documentation: it builds without warnings or network, its generated pages are current, and what it shows works.

Shell lines and Python blocks of README.md and docs/*.md are checked as far as that takes no GPU, network, cluster or
trained run:

- `python -m experiments.plan … --dry-run` and `--help-config` are executed;
- other commands of this repository exist and have every option that is given; their `key=value` are composed like a
  run's (or, for `eval.run`, set on a planned run's config) and their experiments are files;
- `make` targets exist, and every shell block is parsed by bash; lines that install, copy or activate are only parsed;
- Python blocks are executed on a small random Llama, and on SmolLM2-135M among the `real` tests.
"""

from __future__ import annotations

import html
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from analysis.results_page import TEMPLATE
from experiments import CONFIGS, ROOT
from experiments.plan.__main__ import main as plan_main
from experiments.plan.compose import plan, set_values

DOCS = ROOT / "docs"
GENERATED = runpy.run_path(str(DOCS / "pages.py"))["pages"]
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Nothing to check but the syntax: they change the machine or its shell.
ONLY_PARSED = ("pip", "cp", ".", "apt-get", "pre-commit", "git")
# Their key=value are no settings of a run.
OTHER_KEYS = ("experiments.data", "slurm.status", "slurm.cancel", "slurm.logs")
SLURM_KEYS = ("cluster", "runs_dir")


def blocks(kind: str) -> list[tuple[Path, str]]:
    return [
        (page, text)
        for page in PAGES
        for language, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        if {"bash": "sh"}.get(language, language) == kind
    ]


def commands() -> list[str]:
    """Return every line of the shell blocks without its comment."""
    joined = [text.replace("\\\n", " ") for _, text in blocks("sh")]
    lines = [re.split(r"\s+# ", line)[0] for text in joined for line in text.splitlines()]
    lines = [command.strip() for line in lines for command in line.split(" && ")]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def is_executed(command: str) -> bool:
    return command.startswith("python -m experiments.plan") and ("--dry-run" in command or "--help-config" in command)


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    "command",
    # The memory of every setting of a whole table takes 20 seconds.
    [
        pytest.param(command, marks=[pytest.mark.slow] if "experiment=" in command else [])
        for command in commands()
        if is_executed(command)
    ],
)
def test_plans_are_real(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    plan_main(shlex.split(command)[3:])
    told = capsys.readouterr().out
    assert ("trainable" if "--dry-run" in command else " = ") in told


@cache
def help_of(module: str) -> str:
    """Return what a command prints for --help; it is a process, since some set up the whole process first."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", [command for command in commands() if not is_executed(command)])
def test_commands_exist_with_their_options_and_settings(command: str) -> None:
    words = shlex.split(command)
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "python":
        check_module(words[2], words[3:])
    else:
        assert words[0] in ONLY_PARSED, f"{words[0]}: say in this test how it is checked"


def check_module(module: str, arguments: list[str]) -> None:
    if module.startswith("examples."):  # tests/test_examples.py runs them; --help waits for torch
        files = [ROOT / "examples" / name for name in ("rows.py", f"{module.partition('.')[2]}.py")]
        told = "".join(file.read_text(encoding="utf-8") for file in files)
    else:
        told = help_of(module)
    for word in arguments:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(word.partition('=')[0])}\b", told), f"{module} has no {word}"
    if module in OTHER_KEYS:
        return
    given = [word for word in arguments if re.match(r"[\w.]+=", word)]
    if module == "experiments.reproduce" and not arguments[0].startswith("-"):
        given.insert(0, f"experiment={arguments[0]}")
    names = [word.partition("=")[2] for word in given if word.startswith("experiment=")]
    assert all((CONFIGS / "experiment" / f"{name}.yaml").is_file() for name in names)
    settings = [word for word in given if word.partition("=")[0].split(".")[0] not in ("experiment", *SLURM_KEYS)]
    settings = [word for word in settings if word != "model.path=FILE.gguf"]  # a file of the reader's
    if module == "eval.run":
        protocol = [word for word in settings if word.startswith("protocol=")]
        task = ["task=commonsense_170k", "model=llama2_7b"]
        (config, *_) = plan([*task, *protocol] if protocol else task)
        set_values(config, [word for word in settings if word not in protocol])
    elif settings:
        plan(settings)


@pytest.mark.parametrize(("page", "text"), [pytest.param(*block, id=block[0].name) for block in blocks("sh")])
def test_bash_parses_every_block(page: Path, text: str) -> None:
    plain = re.sub(r"<(\w+)>", r"\1", text)  # a placeholder
    done = subprocess.run(["bash", "-n"], input=plain, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, f"{page}: {done.stderr}"


# ------------------------------------------------------------------------------------------------ Python


PYTHON = list(dict.fromkeys(page for page, _ in blocks("python")))


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what an example registers with PEFT."""
    name: Any = "FIRST_ROWS"
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        monkeypatch.setitem(mapping, name, None)
        monkeypatch.delitem(mapping, name)


def execute(page: Path, folder: Path) -> None:
    """Execute the page's Python blocks one after the other; on the page of the method each alone, behind the first."""
    names: dict[str, Any] = {"__name__": "__main__"}
    texts = [text.replace(HUB_ID, str(folder)) for other, text in blocks("python") if other == page]
    for number, text in enumerate(texts):
        if page.name == "method.md":
            names = {"__name__": "__main__"}
            text = text if number == 0 else f"{texts[0]}\n{text}"
        exec(compile(text, f"{page.name}, block {number + 1}", "exec"), names)


def small_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from experiments.models.tiny import make_tokenizer

    torch.manual_seed(0)
    make_tokenizer(720, 0).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=720,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    execute(page, folder)


@pytest.mark.real
@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run_on_real_weights(
    page: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    execute(page, smollm2)


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize(("path", "text"), [pytest.param(*page, id=page[0].name) for page in GENERATED()])
def test_generated_pages_are_current(path: Path, text: Callable[[], str]) -> None:
    assert path.read_text(encoding="utf-8") == text(), "run `python docs/pages.py`"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_an_included_file_is_also_named(page: Path) -> None:
    """A code host shows no include, so the text says which file it is. A link to it would break on the site."""
    text = page.read_text(encoding="utf-8")
    for included in re.findall(r"^```\{include\} (\S+)$", text, re.MULTILINE):
        assert f"`{included.removeprefix('../')}`" in text, included


def test_the_page_for_installing_names_the_required_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (DOCS / "install.md").read_text(encoding="utf-8")
    assert f"Python {project['requires-python'].replace('>=', '≥ ')}" in text
    for name in ("torch", "transformers", "peft"):
        assert next(f"`{needed}`" for needed in project["dependencies"] if needed.startswith(name)) in text


# Names that have digits: everything else with a digit in the template's prose would be a typed number.
NAMES = r"SmolLM2-135M|GSM8K|MagR|LLaMA2|LLaMA3|S2FT|N=\d+"


def test_no_number_of_the_results_page_is_typed() -> None:
    prose = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\]\([^)]*\)", "", TEMPLATE.read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(r"\w*\d[\w.%]*", re.sub(NAMES, "", prose)) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-d", str(out / "trees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(out / "html")],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_site_has_every_page_and_links_that_resolve(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert {path.stem for path in pages} >= {path.stem for path in DOCS.glob("*.md")}
    anchors = {path: set(re.findall(r'\sid="([^"]+)"', text)) for path, text in pages.items()}
    checked = 0
    for path, text in pages.items():
        for link in re.findall(r'<a\s[^>]*href="([^"]*)"', text):
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"\w+:", target):
                continue
            page = (path.parent / target).resolve() if target else path
            assert page.is_file(), f"{path.name}: {link}"
            if anchor and page.suffix == ".html":
                assert anchor in anchors[page], f"{path.name}: {link}"
            checked += 1
    assert checked > 500


@pytest.mark.slow
def test_the_site_needs_no_network(site: Path) -> None:
    """Only links that a reader follows lead elsewhere: nothing that a browser loads with the page."""
    for path in [*site.glob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*\shref="([^"]+)"', text) + re.findall(
            r"(?:url|@import)\(?['\"]?([^'\")\s]+)", text
        )
        assert [link for link in loaded if re.match(r"(\w+:)?//", link)] == [], path.name
