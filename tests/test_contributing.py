"""What contributors find: the guide, the hooks, the workflow and the forms, held to the Makefile and to .ci/run."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from experiments import ROOT

BIN = Path(sys.executable).parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def steps() -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


def commands(text: str) -> list[str]:
    """Return the lines that call make or pip, in their order, without comments."""
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if re.match(r"make \S|\.venv/bin/python -m pip", line)]


def test_the_guide_shows_the_makefile_s_own_list() -> None:
    command = ["make", "--no-print-directory", "help"]  # `make test` runs this, and a make inside one says where it is
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    assert f"```text\n{shown}```" in read("CONTRIBUTING.md"), "paste what `make help` prints into CONTRIBUTING.md"


def test_the_files_that_the_guides_name_exist() -> None:
    made = ("diablo/methods/rslora.py", "configs/method/rslora.yaml")  # by whoever follows the guide
    text = read("CONTRIBUTING.md") + read("SECURITY.md")
    paths = {name or link for name, link in re.findall(r"`([a-z_]+/[\w./]+)`|\]\((\S+?)\)", text)} - set(made)
    assert len(paths) > 12
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_the_workflow_calls_the_targets_of_the_local_check() -> None:
    run = "\n".join(step.get("run", "") for step in steps())
    assert commands(run) == commands(read(".ci/run"))
    assert {"make lint", "make test", "make test-slurm"} <= set(commands(run))
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert {line.split()[1] for line in commands(run) if line.startswith("make")} <= targets


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~;\[ ]", requirement)[0]).lower()


def test_the_pinned_lists_need_no_other_package() -> None:
    """They are installed with --no-deps. lm_eval's own list is left out: it is mostly for tasks that are not used."""
    lists = {file: read(file).splitlines() for file in ("requirements.txt", "requirements-dev.txt")}
    names = {file: [name_of(line) for line in lines if "==" in line] for file, lines in lists.items()}
    pipeline, everything = set(names["requirements.txt"]), {name for found in names.values() for name in found}
    assert len(everything) == sum(map(len, names.values())), "a package is listed twice"
    for known in (pipeline, everything):
        for name in sorted(known - {"lm-eval"}):
            needs = [Requirement(line) for line in requires(name) or ()]
            asked = {name_of(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}
            assert asked <= known | {"setuptools"}, f"{name} needs {sorted(asked - known)}"


def imports(path: Path) -> set[str]:
    """Return the packages that a file imports whatever happens: not in a function, a `try` or under a condition."""
    found = ast.parse(path.read_text(encoding="utf-8")).body
    names = [alias.name for node in found if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in found if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_what_is_used_of_lm_eval_finds_its_imports() -> None:
    pinned = {name_of(line) for line in read("requirements.txt").splitlines() if "==" in line}
    home = Path(str(importlib.util.find_spec("lm_eval").origin)).parent  # pyright: ignore[reportOptionalMemberAccess]
    packages = packages_distributions()
    for name in ("api/task", "api/metrics", "api/model", "evaluator", "models/huggingface", "models/vllm_causallms"):
        for package in sorted(imports(home / f"{name}.py") - sys.stdlib_module_names - {"lm_eval", "vllm"}):
            known = {name_of(distribution) for distribution in packages.get(package, [])}
            assert known & pinned, f"lm_eval/{name}.py imports {package}, which requirements.txt does not have"


def test_actions_have_versions() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+(\.\d+)*", name) for name in used)


def test_the_hooks_are_make_lint() -> None:
    recipe = read("Makefile").partition("\nlint:")[2].partition("\n\n")[0].splitlines()[1:]
    config = yaml.safe_load(read(".pre-commit-config.yaml"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository of its own with the hooks and the packages."""
    folder = tmp_path / "clone"
    for name in ("diablo", "experiments", "eval", "analysis", "slurm"):  # all: they import each other
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").symlink_to(BIN.parent)
    (folder / ".gitignore").write_text(".venv\n", encoding="utf-8")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_the_hooks_run_and_refuse_what_lint_refuses(clone: Path, tmp_path: Path) -> None:
    def hooks() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "home"), "SKIP": "pyright"}  # it takes minutes
        return subprocess.run(
            [BIN / "pre-commit", "run", "--all-files"],
            cwd=clone, env=environment, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip

    done = hooks()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Passed") == 2
    (clone / "analysis" / "wrong.py").write_text("import os\nx   = 1\n", encoding="utf-8")
    subprocess.run(["git", "add", "."], cwd=clone, check=True)
    done = hooks()
    assert done.returncode == 1
    assert done.stdout.count("Failed") == 2
    assert "wrong.py" in done.stdout


@pytest.mark.parametrize("form", ["bug", "result"])
def test_the_forms_ask_for_what_an_answer_needs(form: str) -> None:
    body = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{form}.yml"))["body"]
    required = {field["id"] for field in body if field.get("validations", {}).get("required")}
    assert {"bug": {"command", "output"}, "result": {"command", "gpu", "rates", "seeds", "record"}}[form] <= required
    assert all(field["type"] in ("markdown", "input", "textarea") for field in body)
    assert all(field["attributes"].get("label") or field["type"] == "markdown" for field in body)
