"""Every command answers `--help` under its own name, before it loads what takes long."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from experiments import ROOT

PACKAGES = ("experiments", "eval", "analysis", "slurm")
WORKERS = ("experiments.reproduce.workers", "eval.comparisons", "eval.sandbox_runner")  # started by other commands
SECONDS = 1.0  # of processor time; half a second on this project's machines, and others are slower


def commands(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    names = []
    for path in sorted(path for package in packages for path in (ROOT / package).rglob("*.py")):
        if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8"):
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return [name for name in names if name not in WORKERS]


# Asks each command for its help, in a process of its own, without the start of Python: that is 0.02 s.
HELP = """
import json, os, sys, tempfile
told = {}
for module in sys.argv[1:]:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if child == 0:
            import contextlib, runpy
            sys.argv = ["", "--help"]
            with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            output.flush()
            os._exit(9 if "torch" in sys.modules else 0)
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        told[module] = [output.read(), os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, int, float]]:
    done = subprocess.run(
        [sys.executable, "-c", HELP, *commands()], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_there_are_commands() -> None:
    assert {"experiments.train", "experiments.speed.layers", "eval.run", "slurm.retry", "slurm.job"} <= {*commands()}
    assert len(commands()) >= 25


@pytest.mark.parametrize("module", commands())
def test_help_answers_at_once_and_by_the_command_s_own_name(
    module: str, helps: dict[str, tuple[str, int, float]]
) -> None:
    output, status, seconds = helps[module]
    assert output.startswith(f"usage: python -m {module} ")
    assert status == 0, "it loaded torch"
    assert seconds < SECONDS


def test_every_command_that_texts_and_files_name_exists() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    known, named = {*commands((*PACKAGES, "diablo")), *WORKERS}, {}
    for name in listed.stdout.decode("utf-8").splitlines():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".yaml", ".yml", ".j2", ".rst", ".ipynb", ".toml") and path.is_file():
            if name.startswith(("results/", "CHANGELOG")):
                continue  # what they say is of earlier versions
            for module in re.findall(
                r"python -m ((?:experiments|eval|analysis|slurm|diablo)\b[\w.]*)", path.read_text(encoding="utf-8")
            ):
                named.setdefault(module.rstrip("."), name)
    assert len(named) > 20
    assert {module: name for module, name in named.items() if module not in known} == {}
