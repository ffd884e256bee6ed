"""The estimated memory of a run against measured peaks: recorded ones of a GPU, and passes on this CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.config import RunConfig
from experiments.models.shapes import build_config, empty_base
from experiments.plan import fake_pass
from experiments.plan import fit as fitting
from experiments.plan.__main__ import main
from experiments.plan.compose import plan
from experiments.plan.cost import longest_row
from experiments.plan.fake_pass import Allocations, make_fake
from experiments.plan.memory import Memory, base_dtype, estimate
from experiments.plan.overview import MEASURED, memory_table, off_by
from experiments.plan.sizes import held, pass_bytes
from experiments.runs.sizes import gibibytes, read_bytes
from experiments.settings import with_values
from experiments.speed.cases import AUTHORS, DORA, DROPOUT, FLOOR, IN_PLACE, LORA, attach, peak_bytes
from experiments.speed.layer_passes import TARGETS, architecture
from experiments.speed.timing import forward_backward
from experiments.train import methods

FailsWith = Callable[[Callable[[], object]], str]
RECORD = MEASURED.with_name("benchmark.json")
GPU = read_bytes("80G")


def run(*arguments: str) -> RunConfig:
    (config,) = plan(arguments)
    return config


def real(model: str, method: str, *more: str) -> RunConfig:
    return run(f"model={model}", f"method={method}", "task=commonsense_170k", *more)


# Against measurements


def recorded() -> dict[str, int]:
    (case,) = json.loads(RECORD.read_text(encoding="utf-8"))["models"]
    return {label: entry["peak_bytes"] for label, entry in case["entries"].items() if label != AUTHORS}


@pytest.mark.parametrize("label", [FLOOR, LORA, DORA, DROPOUT, IN_PLACE])
def test_a_pass_of_llama2_7b_takes_what_it_took_on_a_gpu(label: str) -> None:
    """Two and three layers on fake tensors, extrapolated to 32: the base, adapters and saved tensors, within 1 %."""
    (case,) = json.loads(RECORD.read_text(encoding="utf-8"))["models"]
    attached = "DiaBlo adapter" if label in (DROPOUT, IN_PLACE) else label
    peaks = []
    for depth in (2, 3):
        base: Any = empty_base({**architecture(case["model"]), "num_hidden_layers": depth})
        base = base.to(torch.bfloat16)
        base.config.use_cache = False
        model = attach(attached, base, TARGETS[case["targets"]], case["num_blocks"], case["rank"], None).train()
        with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations:
            make_fake(model)
            tokens = torch.zeros(case["tokens"] // case["length"], case["length"], dtype=torch.int64)
            allocations.begin()
            forward_backward(model, tokens)
        peaks.append(allocations.peak)
    assert peaks[1] + 29 * (peaks[1] - peaks[0]) == pytest.approx(recorded()[label], rel=0.01)


def test_whole_runs_take_what_they_took_on_a_gpu(data_root: Path, smollm2: Path) -> None:
    """SmolLM2-135M with DiaBlo, LoRA and full fine-tuning, the longest row 512 tokens, within 2 %."""
    for entry in json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]:
        config = run(*entry["overrides"], f"runtime.data_root={data_root}")
        assert longest_row(config) == 512
        assert estimate(config).peak == pytest.approx(entry["peak_bytes"], rel=0.02)
        (line,) = off_by([config])
        assert "GiB on NVIDIA H200, estimated" in line
        assert estimate(config).peak == pytest.approx(entry["estimated_bytes"], abs=5_000_000)


SHAPES = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "diablo", "lora", "dora", "prompt"])
def test_a_pass_takes_what_it_takes_on_this_cpu(method: str, checkpointing: bool) -> None:
    """In float32, measured by the allocator's own events."""
    from transformers import AutoModelForCausalLM

    config = run("model=llama2_7b", f"method={method}", "task=commonsense_170k", "recipe.adapter_dropout=0",
                 "recipe.learning_rate=1e-4")  # fmt: skip
    if "num_blocks" in (config.method.adapter or {}):
        config = with_values(config, {"method.adapter.num_blocks": 8})
    settings = config.method
    base: Any = AutoModelForCausalLM.from_config(build_config(SHAPES), dtype=torch.float32)
    base.config.use_cache = False
    model: Any = methods.attach(settings, base).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    work = partial(fake_pass.forward_backward, model, tokens, autocast=False)
    work()
    measured = peak_bytes(work, model.parameters(), "cpu")
    guess = max(pass_bytes(json.dumps(SHAPES), json.dumps(asdict(settings)), "float32", False, 4, 128, checkpointing))
    assert guess == pytest.approx(measured, rel=0.01)


def test_few_layers_tell_of_many() -> None:
    """The extrapolation from few layers against all six layers."""
    settings = real("llama2_7b", "lora").method
    arguments = (json.loads(json.dumps(SHAPES)), settings, "bfloat16", True, 4, 128, False)
    assert max(pass_bytes(json.dumps(SHAPES), json.dumps(asdict(settings)), *arguments[2:])) == pytest.approx(
        max(fake_pass._peaks(*arguments, 6)), rel=0.002
    )


def test_few_layers_tell_of_many_with_a_large_embedding() -> None:
    """Gradients of the embedding at the end of the backward pass outweigh activations of three layers, not of all."""
    shapes = {**SHAPES, "vocab_size": 65536, "tie_word_embeddings": True, "num_hidden_layers": 32}
    settings = real("llama2_7b", "full").method
    more = ("float32", False, 1, 128, False)
    few, many = (fake_pass._peaks(shapes, settings, *more, depth) for depth in (3, 32))
    assert few[0] < few[1]
    assert many[0] > many[1]
    assert max(pass_bytes(json.dumps(shapes), json.dumps(asdict(settings)), *more)) == pytest.approx(
        max(many), rel=0.002
    )


# Sums over tensors


def test_weights_gradients_and_state_are_sums_over_tensors() -> None:
    found = estimate(real("llama2_7b", "full"))
    parameters = 6_738_415_616
    assert (found.gradients, found.optimizer) == (4 * parameters, 8 * parameters)
    assert found.weights == pytest.approx(4 * parameters, rel=1e-6)  # and the rotary embedding's frequencies
    diablo = estimate(real("llama2_7b", "diablo", "method.adapter.num_blocks=128", "recipe.adapter_dropout=0"))
    trained = 35_127_296
    assert (diablo.gradients, diablo.optimizer) == (4 * trained, 8 * trained)
    # The base in bf16, D in float32, and a bf16 copy of the base's values where D is in the weight.
    assert diablo.weights == pytest.approx(2 * parameters + 6 * trained, rel=1e-6)
    dropped = estimate(real("llama2_7b", "diablo", "method.adapter.num_blocks=128", "recipe.adapter_dropout=0.05"))
    assert diablo.weights - dropped.weights == 2 * trained
    assert estimate(real("llama2_7b", "lora", "recipe.optimizer=sgd")).optimizer == 0


def test_shards_are_equal_parts() -> None:
    alone, four = (estimate(real("llama3_8b", "full", "runtime.sharding=full"), gpus) for gpus in (1, 4))
    assert (four.weights, four.gradients, four.optimizer) == (
        *(-(-getattr(alone, part) // 4) for part in ("weights", "gradients", "optimizer")),
    )
    assert four.accumulates is False  # 16 rows, 4 on each of 4
    assert alone.accumulates is True
    assert four.peak < alone.peak / 3


def test_without_sharding_each_gpu_holds_everything() -> None:
    """Gradients are held twice, since DDP sums them in its own buckets."""
    alone, four = (estimate(real("llama2_7b", "lora"), gpus) for gpus in (1, 4))
    assert (four.weights, four.optimizer, four.activations) == (alone.weights, alone.optimizer, alone.activations)
    assert (four.gradients, four.buckets) == (alone.gradients, alone.gradients)


def test_the_peak_of_a_step() -> None:
    parts: dict[str, Any] = {"gpus": 1, "length": 8, "weights": 100, "gradients": 10, "optimizer": 20, "activations": 7}
    parts["buckets"] = 0
    assert Memory(**parts, accumulates=True).peak == 137
    assert Memory(**parts, accumulates=False).peak == 130  # gradients appear while activations are freed
    assert Memory(**{**parts, "buckets": 10}, accumulates=False).peak == 140  # which DDP keeps
    assert Memory(**parts, accumulates=False, preparation=150).peak == 150


def test_a_quantised_base_takes_its_packed_size() -> None:
    plain, packed = (
        estimate(run("model=llama2_7b", "method=lora", "task=math_10k", *more)) for more in ((), ("quantization=nf",))
    )
    # 6.5 G weights at 4.25 bits and the embeddings in bf16, as the plan's own line says
    assert plain.weights - packed.weights == pytest.approx(6_476_005_376 * (2 - 4.25 / 8), rel=0.001)
    assert packed.gradients == plain.gradients


def test_choosing_blocks_takes_more_than_training_them() -> None:
    config = real("llama2_7b", "smt")
    found = estimate(config)
    parameters, targets = 6_738_415_616, 3 * 32 * 4096**2
    everything = held(
        *(json.dumps(part) for part in (config.model.architecture, config.mapping["method"])), base_dtype(config)
    )
    assert everything.base == parameters
    assert found.preparation > 18 * parameters + 4 * everything.targets
    assert everything.targets <= targets
    assert found.training < found.preparation / 5


@pytest.mark.slow
def test_every_method_has_an_estimate() -> None:
    """Including methods that choose weights from data, which is impossible on the meta device."""
    from experiments.plan.compose import options

    small = [f"model.architecture.{key}={SHAPES[key]}" for key in SHAPES if key not in ("model_type", "vocab_size")]
    for method in options("method"):
        more = ["method.adapter.num_blocks=3", "method.adapter.block_size=64"] if method == "smt" else []
        more += ["method.adapter.num_blocks=8"] if method == "diablo" else []
        more += ["method.adapter.o_ratio=0"] if method == "s2ft" else []  # its share of four heads rounds to zero
        more += ["method.adapter.density=1/8"] if method == "sparse" else []  # dense enough for the other algorithm
        found = estimate(real("llama2_7b", method, *small, *more, "recipe.learning_rate=1e-4"))
        assert found.weights > 0
        assert (found.activations > 0) == (method != "base")


# What fits


def test_the_fewest_gpus_that_a_run_fits() -> None:
    asked = [("llama2_7b", "lora"), ("llama_13b", "diablo"), ("llama2_7b", "full"), ("llama3_8b", "full")]
    assert [fitting.gpus_needed(real(*names), GPU, 8) for names in asked] == [1, 1, 2, 4]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(fails_with: FailsWith) -> None:
    full = real("llama3_8b", "full")
    said = fails_with(lambda: fitting.check_fits(full, 1, GPU, 8))
    assert said.startswith("full on llama3_8b and commonsense_170k does not fit: it needs ")
    assert "73.6 GiB are usable on one GPU: give 4 GPUs, sharded (" in said
    assert "checkpointing" not in said  # not sufficient alone
    long = run("model=llama2_7b", "method=lora", "task=metamathqa", "recipe.micro_batch_size=32")
    said = fails_with(lambda: fitting.check_fits(long, 1, GPU, 8))
    assert "give runtime.gradient_checkpointing=true (" in said
    assert ", or recipe.micro_batch_size=" in said
    small_gpu = fails_with(lambda: fitting.gpus_needed(full, read_bytes("24G"), 1))
    assert "give GPUs with more memory" in small_gpu
    fitting.check_fits(full, 4, GPU, 8)
    fitting.check_fits(real("llama3_8b", "base"), 1, GPU, 8)
    whole = real("llama3_8b", "full", "runtime.sharding=none")
    for check in (lambda: fitting.gpus_needed(whole, GPU, 8), lambda: fitting.check_fits(whole, 4, GPU, 8)):
        assert ": give runtime.sharding=auto and 4 GPUs, sharded (" in fails_with(check)
    said = fails_with(lambda: fitting.check_fits(full, 3, GPU, 8))
    assert said.endswith("micro_batch_size=4 × 3 GPUs: give 1, 2, 4 GPUs, or another recipe.micro_batch_size")


def test_no_more_workers_than_fit_the_memory(fails_with: FailsWith) -> None:
    """Runs side by side are neighbours in the order: full fine-tuning with the LoRA before or after it."""
    runs = [real("llama2_7b", "lora", f"seed={seed}") for seed in range(3)] + [real("llama2_7b", "full")]
    lora, full = (estimate(config).peak + fitting.PROCESS for config in runs[-2:])
    assert lora < full
    for workers, needed in ((1, full), (2, full + lora), (4, full + 3 * lora), (9, full + 3 * lora)):
        room = int(needed / fitting.USABLE) + 2**20
        fitting.check_workers(runs, workers, room)
        together = "1 run" if workers == 1 else f"{min(workers, 4)} runs"
        least = f"--workers {workers}: {together} at the same time need up to {gibibytes(needed)}, and "
        said = fails_with(lambda workers=workers, room=room: fitting.check_workers(runs, workers, room - 2**21))
        assert said.startswith(least)
        few = "a smaller recipe.micro_batch_size and no --workers" if workers == 1 else f"at most {min(workers, 4) - 1}"
        assert said.endswith(f"are usable here: give {few}")
    apart = [runs[3], *runs[:3], real("llama2_7b", "full", "seed=1")]  # the two largest never run at the same time
    fitting.check_workers(apart, 2, int((full + lora) / fitting.USABLE) + 2**20)
    fitting.check_workers([], 9, 1)  # everything is finished


def test_what_is_sharded(fails_with: FailsWith) -> None:
    """A run that fits each GPU unsharded is not sharded unless requested."""
    full, lora = real("llama2_7b", "full"), real("llama2_7b", "lora")
    assert [fitting.sharding_on(config, 2, GPU) for config in (full, lora)] == ["full", "none"]
    assert fitting.sharding_on(full, 2, None) == "none"
    assert fitting.sharding_on(real("llama2_7b", "lora", "runtime.sharding=full"), 2, GPU) == "full"
    assert fitting.gpus_needed(real("llama2_7b", "lora", "runtime.sharding=full"), GPU, 8) == 2
    assert fitting.sharding_on(real("llama2_7b", "base", "runtime.sharding=full"), 2, GPU) == "none"
    assert "gets 1 GPU: give more, or runtime.sharding=auto" in fails_with(
        lambda: fitting.sharding_on(real("llama2_7b", "lora", "runtime.sharding=full"), 1, GPU)
    )


@pytest.mark.slow
def test_what_cannot_be_sharded_is_not_given_more_gpus(fails_with: FailsWith) -> None:
    """A quantised base is complete on every GPU."""
    config = run("model=llama_13b", "method=lora", "task=math_10k", "quantization=nf")
    assert fitting.gpus_needed(config, GPU, 8) == 1
    said = fails_with(lambda: fitting.gpus_needed(config, read_bytes("8G"), 8))
    assert "does not fit" in said
    assert "sharded" not in said
    measured = real("llama2_13b", "lora", "spectra.every=8")
    assert "sharded" not in fails_with(lambda: fitting.check_fits(measured, 2, read_bytes("24G"), 8))


# What is printed


def test_a_dry_run_prints_the_memory_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["model=llama2_7b", "task=commonsense_170k", "method=lora,base", "recipe.learning_rate=1e-4,2e-4", "--dry-run"]
    )
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["GiB", "per", "GPU", "runs", "GPUs", "micro-batch", *table[0].split()[6:]]
    assert table[1].split()[:8] == ["llama2_7b", "lora-r32", "2", "1", "4", "×", "256", "12.8"]
    assert table[2].startswith("estimates: -1.0 to -0.8 % off the measured peaks of 3 runs of SmolLM2-135M")


def test_settings_of_one_label_are_told_apart() -> None:
    configs = plan(
        ["model=llama2_7b", "task=commonsense_170k", "method=lora", "protocol.train_on_prompt=true,false", "seed=0,1"]
    )
    _, *lines, _ = memory_table(configs)
    assert [line.split()[-1] for line in lines] == ["protocol.train_on_prompt=True", "protocol.train_on_prompt=False"]
    assert [line.split()[2] for line in lines] == ["2", "2"]


def test_a_quantised_base_is_estimated_for_the_gpu_wherever_it_is_planned() -> None:
    """`auto` means bfloat16 on the GPU, whatever it means on the machine that plans."""
    auto, named = (
        estimate(run("model=llama3_2_1b", "method=lora", "task=math_10k", "quantization=nf", f"model.dtype={dtype}"))
        for dtype in ("auto", "bfloat16")
    )
    assert auto == named
    assert auto.weights > 0
