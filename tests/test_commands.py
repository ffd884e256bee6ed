"""Every command answers `--help` under its own name, before it loads what takes long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experiments import ROOT

PACKAGES = ("experiments", "eval", "analysis", "slurm")
WORKERS = ("experiments.reproduce.workers", "eval.comparisons", "eval.sandbox_runner")  # started by other commands
SECONDS = 1.0  # of processor time; half a second on this project's machines, and others are slower


def commands() -> list[str]:
    names = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
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
