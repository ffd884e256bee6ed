"""vLLM's CPU build, in a separate environment: as generation back end, and serving a converted adapter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from diablo import DiabloConfig
from diablo.low_rank import to_lora
from eval.run import evaluate
from experiments import ROOT
from experiments.runs.records import EvalRecord, RunPaths, read_lines, read_record
from experiments.train.run import train
from tests.conftest import SMALL, planned

PROBLEMS = 24


@pytest.fixture
def vllm_python() -> str:
    """Return the interpreter of an environment with vLLM; skip without it."""
    path = os.environ.get("DIABLO_VLLM_PYTHON")
    if not path or not Path(path).is_file():
        pytest.skip("vLLM is not installed: `make install-vllm`, and name .venv-vllm/bin/python in DIABLO_VLLM_PYTHON")
    return path


def score_on_vllm(python: str, run: RunPaths, *overrides: str) -> None:
    done = subprocess.run(
        [python, "-m", "eval.run", str(run.root), "evaluation.backend=vllm", *overrides],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def evaluations(run: RunPaths) -> dict[tuple[str, str, int], tuple[list[str], EvalRecord]]:
    """Map (back end, benchmark, samples per row) to completions and record."""
    found = {}
    for paths in run.evaluations():
        record = read_record(paths.score, EvalRecord)
        _, *lines = read_lines(paths.samples)
        found[record.backend, record.benchmark, record.samples] = [line["completion"] for line in lines], record
    return found


@pytest.mark.slow
def test_both_back_ends_write_the_same_answers(
    vllm_python: str, tmp_path: Path, cache_dir: Path, data_root: Path
) -> None:
    """Greedy answers of the merged tiny model to GSM8K and MATH with the metamath protocol; then sampled ones."""
    arguments = [
        *(argument for argument in SMALL if not argument.startswith("task.")),
        *("task=metamathqa", "protocol=metamath", "task.data.source=gsm8k"),  # MetaMathQA itself is large
        *("method=diablo", "method.adapter.num_blocks=4", "recipe.learning_rate=1e-2", "recipe.max_steps=4"),
        *("protocol.max_length=256", "evaluation.generation.max_new_tokens=32", f"evaluation.limit={PROBLEMS}"),
        # vLLM's CPU attention supports head sizes 32, 64 …, and those of `tiny` are 24.
        *("model.architecture.num_attention_heads=3", "model.architecture.num_key_value_heads=1"),
        *(f"runtime.data_root={data_root}", f"runtime.runs_dir={tmp_path}", f"runtime.cache_dir={cache_dir}"),
    ]
    run = planned(arguments)
    train(run)
    evaluate(run)
    score_on_vllm(vllm_python, run)
    sampled = ["evaluation.generation.samples=3", "evaluation.generation.temperature=1.0", "evaluation.limit=4"]
    score_on_vllm(vllm_python, run, *sampled, "evaluation.benchmarks=[gsm8k]")
    found = evaluations(run)
    for benchmark in ("gsm8k", "math"):
        ours, our_record = found["hf", benchmark, 1]
        theirs, their_record = found["vllm", benchmark, 1]
        assert len(ours) == len(theirs) == PROBLEMS
        assert any(ours)
        # Float32 rounding differs between the two; a near tie may be decided differently, changing all later tokens.
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        assert same >= PROBLEMS - 2, [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
        assert their_record.data_hash == our_record.data_hash
        assert "vllm" in " ".join(their_record.environment)
    texts, _ = found["vllm", "gsm8k", 3]
    assert len(texts) == 12
    assert any(len(set(texts[start : start + 3])) > 1 for start in range(0, 12, 3))  # each sample has its own seed
    assert not list(run.root.glob(".merged-*"))  # the exported model is deleted


SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    base, lora, rank, prompts, out = sys.argv[1:]
    model = LLM(base, skip_tokenizer_init=True, dtype="float32", enable_lora=True, max_lora_rank=int(rank),
                max_model_len=64, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    rows = [{"prompt_token_ids": row} for row in json.loads(prompts)]
    answers = [[list(output.outputs[0].token_ids) for output in model.generate(rows, settings, lora_request=request)]
               for request in (None, LoRARequest("converted", 1, lora))]
    open(out, "w", encoding="utf-8").write(json.dumps(answers))
"""


@pytest.mark.slow
def test_vllm_serves_a_diablo_adapter_converted_to_lora(vllm_python: str, tmp_path: Path) -> None:
    """Greedy tokens equal those of the DiaBlo adapter in PEFT, at a rank where the conversion is exact."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    base: Any = LlamaForCausalLM(LlamaConfig(vocab_size=512, initializer_range=0.2, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    prompts = torch.randint(0, 512, (4, 8))

    def answers(model: torch.nn.Module) -> list[list[int]]:
        ids = prompts
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        return ids[:, 8:].tolist()

    plain = answers(base)
    model = get_peft_model(base, DiabloConfig(num_blocks=4, task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 4
    model.save_pretrained(str(tmp_path / "adapter"))
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = answers(PeftModel.from_pretrained(fresh, tmp_path / "adapter"))
    assert adapted != plain
    assert set(to_lora(tmp_path / "adapter", tmp_path / "lora").ranks.values()) == {64}
    (tmp_path / "serve.py").write_text(SERVE, encoding="utf-8")
    out = tmp_path / "out.json"
    names = [str(tmp_path / name) for name in ("serve.py", "base", "lora")]
    done = subprocess.run(
        [vllm_python, *names, "64", json.dumps(prompts.tolist()), str(out)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text(encoding="utf-8")) == [plain, adapted]
