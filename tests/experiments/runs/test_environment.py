"""The fields of a record about the machine and the code that made it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from experiments import ROOT
from experiments.runs.environment import TRAINING_CODE, training_code

PRINT = "from experiments.runs.environment import training_code; print(training_code())"


def test_the_training_code_is_there_and_hashed(tmp_path: Path) -> None:
    """A copy has the same hash in any folder; editing a file used in training changes it."""
    assert all(list(ROOT.glob(pattern)) for pattern in TRAINING_CODE)
    for folder in ("diablo", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())

    def hashed() -> str:
        done = subprocess.run(
            [sys.executable, "-c", PRINT], cwd=tmp_path, capture_output=True, check=True, encoding="utf-8"
        )
        return done.stdout.strip()

    assert hashed() == training_code()
    with (tmp_path / "experiments" / "reproduce" / "run.py").open("r+", encoding="utf-8") as file:
        file.write("# nothing that decides a result\n" + file.read())
    assert hashed() == training_code()
    with (tmp_path / "diablo" / "blocks" / "layer.py").open("r+", encoding="utf-8") as file:
        file.write("# something\n" + file.read())
    assert hashed() != training_code()
