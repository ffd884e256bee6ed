"""An unreachable hub costs a few seconds once, and neither planning nor saving contacts it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from diablo.authors import from_authors
from eval.judge import _model
from experiments.config import Data, Method
from experiments.data import hub
from experiments.data.__main__ import check
from experiments.data.rows import load_rows
from experiments.models.full_precision import base_path, load_tokenizer
from experiments.plan.compose import plan
from experiments.plan.cost import rows_trained_on
from experiments.train.methods import save
from tests.diablo.blocks.test_diablo_tuner import tiny_llama
from tests.web_server import Server, serving, silent, status

FailsWith = Callable[[Callable[[], object]], str]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Server], None]]:
    """Yield a function that makes a server the hub, with an empty cache."""

    def point(server: Server) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.delenv("DIABLO_DATA_ROOT", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(datasets_config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        hub.answered.clear()

    yield point
    hub.answered.clear()


@pytest.mark.parametrize("code", [503, 502, 403, 407])
def test_a_proxy_that_answers_instead_is_no_hub(
    code: int, online: Callable[[Server], None], fails_with: FailsWith
) -> None:
    """huggingface_hub would retry a 503 for 23 seconds and print two lines per attempt."""
    with serving(status(code)) as server:
        online(server)
        started = time.perf_counter()
        said = fails_with(lambda: load_rows(Data("metamathqa"), "train", None))
        assert time.perf_counter() - started < 5
        assert "cannot load meta-math/MetaMathQA from the hub (it cannot be reached)" in said
        assert server.asked == [("HEAD", "/")]
        assert not hub.check()
        assert not hub.check(hub.model_file("org/model", None))
        assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_nobody_listens_or_no_name_server_knows_the_name(
    url: str, online: Callable[[Server], None], fails_with: FailsWith
) -> None:
    online(Server(url))
    started = time.perf_counter()
    said = fails_with(lambda: load_rows(Data("metamathqa"), "train", None))
    assert "cannot load meta-math/MetaMathQA from the hub (it cannot be reached)" in said
    online(Server(url))
    assert fails_with(lambda: check([("gsm8k", "test")], None, from_hub=True)) == (
        "the Hugging Face hub cannot be reached: connect, or leave out --hub"
    )
    assert time.perf_counter() - started < 5


def test_a_hub_that_stalls_is_left(online: Callable[[Server], None]) -> None:
    with serving(silent(5)) as server:
        online(server)
        started = time.perf_counter()
        assert not hub.reached(seconds=0.4)
        assert not hub.reached(hub.model_file("org/some", None), seconds=0.4)
        assert time.perf_counter() - started < 2
        assert len(server.asked) == 2


def test_a_hub_that_sends_on_and_on_is_left(online: Callable[[Server], None]) -> None:
    def elsewhere(request: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        request.send_response(302)
        request.send_header("Location", f"{request.path}x")
        request.end_headers()

    with serving(elsewhere) as server:
        online(server)
        started = time.perf_counter()
        assert not hub.reached(seconds=0.5)
        assert time.perf_counter() - started < 2


def test_a_name_server_that_stalls_is_left(online: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own timeout starts only once the address is known."""
    online(Server("http://hub.test"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: time.sleep(5))
    started = time.perf_counter()
    assert not hub.reached(seconds=0.4)
    assert time.perf_counter() - started < 2


def files_fail(request: BaseHTTPRequestHandler) -> None:
    """Answer like a hub whose pages work and whose files fail."""
    status(200 if request.path == "/" else 503)(request)


def test_a_hub_whose_files_fail_is_left(online: Callable[[Server], None], fails_with: FailsWith) -> None:
    """Regression: each file was requested six times within half a minute, with two lines per attempt."""
    folder = "meta-math/MetaMathQA"
    (config,) = plan(
        ["model=tiny", "method=base", "model.path=org/some", "model.revision=abc", "model.pretraining=null"]
    )
    asked = {
        f"/datasets/{folder}/resolve/aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18/README.md": lambda: load_rows(
            Data("metamathqa"), "train", None
        ),
        "/org/some/resolve/abc/config.json": lambda: load_tokenizer(config.model, base_path(config)),
        "/org/judge/resolve/main/config.json": lambda: _model({"model": "org/judge", "revision": None}, "cpu"),
    }
    for path, load in asked.items():
        with serving(files_fail) as server:
            online(server)
            started = time.perf_counter()
            assert "cannot be reached" in fails_with(load)
            assert time.perf_counter() - started < 10
            assert server.asked == [("HEAD", "/"), ("HEAD", path)]


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_file_that_is_not_for_everyone_is_an_answer(code: int, online: Callable[[Server], None]) -> None:
    with serving(lambda request: status(200 if request.path == "/" else code)(request)) as server:
        online(server)
        assert hub.check(hub.model_file("org/gated", None))
        assert hub.check(hub.model_file("org/gated", None))
        assert server.asked == [("HEAD", "/"), ("HEAD", "/org/gated/resolve/main/config.json")]


def test_converting_the_authors_checkpoint_asks_once(online: Callable[[Server], None], tmp_path: Path) -> None:
    torch.save({"layer.block_A": torch.zeros(2, 2, 2)}, tmp_path / "adapter.chkpt")
    with serving(status(503)) as server:
        online(server)
        started = time.perf_counter()
        with pytest.raises(ValueError, match=r"^base model org/some: neither a folder with a config.json nor a hub id"):
            from_authors(tmp_path / "adapter.chkpt", tmp_path / "out", "org/some")
        assert time.perf_counter() - started < 10
        assert server.asked == [("HEAD", "/org/some/resolve/main/config.json")]


@pytest.mark.filterwarnings("error:Could not find a config file")
def test_saving_an_adapter_asks_nobody(online: Callable[[Server], None], tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]
    model.peft_config["default"].base_model_name_or_path = "org/some"
    with serving(status(503)) as server:
        online(server)
        save(Method("lora", "lora", "adapter", {}), model, tmp_path / "adapter", {})
        assert server.asked == []
        assert not constants.HF_HUB_OFFLINE
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("code", [200, 404])
def test_a_hub_that_answers_is_reached(code: int, online: Callable[[Server], None]) -> None:
    with serving(status(code)) as server:
        online(server)
        assert hub.check()
        assert not constants.HF_HUB_OFFLINE


def test_planning_asks_nobody(online: Callable[[Server], None]) -> None:
    """Planning uses the known number of rows of the source; later requests are unaffected."""
    with serving(status(503)) as server:
        online(server)
        (config,) = plan(["model=llama2_7b", "task=metamathqa", "task.data.heldout=7", "method=diablo"])
        assert rows_trained_on(config) == (395_000 - 7) // 32 * 32
        assert server.asked == []
        assert not constants.HF_HUB_OFFLINE
        assert not datasets_config.HF_HUB_OFFLINE
        assert not hub.check()
        assert server.asked == [("HEAD", "/")]
