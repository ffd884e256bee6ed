"""A training on real weights, stopped by a signal and resumed, equals an uninterrupted one bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from experiments.train.run import train
from tests.conftest import planned
from tests.experiments.runs.test_preemption import after, content, preempt
from tests.real_runs import settings

pytestmark = pytest.mark.real

STEPS = 10


@pytest.mark.parametrize("method", ["diablo", "lora"])
def test_resumed_equals_undisturbed(
    method: str, smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by SIGTERM in a separate process; with dropout, so that random states matter."""
    arguments = [
        *smollm2_slice, *settings(tmp_path, data_root), f"method={method}", "recipe.learning_rate=3e-3",
        *("task.data.source=mawps", f"recipe.max_steps={STEPS}", "recipe.adapter_dropout=0.1"),
    ]  # fmt: skip
    whole = planned(arguments)
    train(whole)
    broken = planned([*arguments, f"runtime.runs_dir={tmp_path / 'broken'}"])
    assert broken.root.name == whole.root.name
    marker = preempt("experiments.train", broken, after(2), signal.SIGTERM)
    assert 2 < marker["step"] < STEPS
    assert train(broken).resumed_at == [marker["step"]]
    assert content(broken) == content(whole)
