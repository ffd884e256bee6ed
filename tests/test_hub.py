"""A hub that cannot be reached costs seconds, once, and planning never asks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants

from experiments.data import hub
from experiments.data.rows import load_rows
from experiments.plan.compose import plan
from experiments.plan.cost import rows_trained_on
from tests.web_server import Server, serving, status

FailsWith = Callable[[Callable[[], object]], str]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Server], None]]:
    """The hub is the server that the test names, with an empty cache."""

    def point(server: Server) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.delenv("DIABLO_DATA_ROOT", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(datasets_config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        hub.answers.cache_clear()

    yield point
    hub.answers.cache_clear()


@pytest.mark.parametrize("code", [503, 502, 403, 407])
def test_a_proxy_that_answers_instead_is_no_hub(
    code: int, online: Callable[[Server], None], fails_with: FailsWith
) -> None:
    """huggingface_hub retries a 503 for 23 seconds, and writes two lines each time."""
    with serving(status(code)) as server:
        online(server)
        started = time.perf_counter()
        said = fails_with(lambda: load_rows({"source": "metamathqa", "heldout": 0}, "train", None))
        assert time.perf_counter() - started < 5
        assert "cannot load meta-math/MetaMathQA from the hub (it cannot be reached)" in said
        assert server.asked == [("HEAD", "/")]
        assert not hub.check()
        assert len(server.asked) == 1


@pytest.mark.parametrize("code", [200, 404])
def test_a_hub_that_answers_is_reached(code: int, online: Callable[[Server], None]) -> None:
    with serving(status(code)) as server:
        online(server)
        assert hub.check()
        assert not constants.HF_HUB_OFFLINE


def test_planning_asks_nobody(online: Callable[[Server], None]) -> None:
    """It takes the number of rows that the source is known to have, and what is asked later is asked as before."""
    with serving(status(503)) as server:
        online(server)
        (config,) = plan(["model=llama2_7b", "task=metamathqa", "task.data.heldout=7", "method=diablo"])
        assert rows_trained_on(config) == (395_000 - 7) // 32 * 32
        assert server.asked == []
        assert not constants.HF_HUB_OFFLINE
        assert not datasets_config.HF_HUB_OFFLINE
        assert not hub.check()
        assert server.asked == [("HEAD", "/")]
