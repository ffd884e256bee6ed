"""Runs on quantised bases: the cached base, training and scoring on it, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import diablo.quantize.model
from diablo.quantize import QuantizedLinear, load_quantized, quantized_layers
from eval.backends import load
from eval.run import evaluate
from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.merge import main as merge_main
from experiments.models.full_precision import load_full_precision
from experiments.models.load import load_base
from experiments.models.quantized import load_quantized_base, make_quantized, planned_sizes
from experiments.plan.compose import plan
from experiments.plan.counting import count
from experiments.quantize import main
from experiments.runs.config_files import read_config
from experiments.runs.records import RunPaths, read_json
from experiments.settings import with_values
from experiments.train import methods
from experiments.train.run import train
from tests.conftest import planned

FEW = ["recipe.max_steps=4", "evaluation.limit=8"]
CALIBRATED = ["quantization.calibration.samples=4", "quantization.calibration.length=64"]


def config_of(arguments: list[str]) -> RunConfig:
    (config,) = plan(arguments)
    return config


def bases(cache: Path) -> list[Path]:
    return sorted((cache / "quantized").glob("*/quantization.json"))


@pytest.fixture
def own_cache(small: list[str], cache_dir: Path, tmp_path: Path) -> list[str]:
    """Return `small` with a separate cache for quantised bases; the full-precision base is shared."""
    load_full_precision(config_of(small))
    own = tmp_path / "cache"
    own.mkdir()
    (own / "base").symlink_to(cache_dir / "base")
    return [*small, f"runtime.cache_dir={own}"]


@pytest.mark.parametrize(
    ("arguments", "bits_per_weight"),
    [
        # 16 bits of scale and 8 of zero point per 32 weights; normal-float: 16, and four levels of 32 bits per layer.
        (
            [
                "method=diablo",
                "quantization=magr",
                "quantization.bits=2",
                "quantization.options.iterations=20",
                *CALIBRATED,
            ],
            2.75,
        ),
        (["method=lora", "quantization=nf", "quantization.bits=2"], 2.5 + 7 * 128 * 4 / (4 * 82944)),
    ],
)
def test_a_run_trains_and_is_scored_on_a_quantised_base(
    own_cache: list[str],
    tmp_path: Path,
    arguments: list[str],
    bits_per_weight: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = planned([*own_cache, *FEW, *arguments])
    config = read_config(run)
    record = train(run)
    (made,) = bases(tmp_path / "cache")
    base = json.loads(made.read_text(encoding="utf-8"))
    assert base["bits_per_weight"] == pytest.approx(bits_per_weight)
    assert record.base_hash == base["hash"]
    assert record.changed
    assert (record.trainable_parameters, record.base_parameters) == (count(config).trainable, count(config).base)
    sizes = planned_sizes(config)
    assert [sizes[key] for key in ("quantized_bytes", "other_bytes")] == [
        base[key] for key in ("quantized_bytes", "other_bytes")
    ]
    (scored,) = evaluate(run)
    assert (scored.n, scored.base_hash, scored.identity) == (8, base["hash"], False)

    # Merged, as in scoring, the model has no packed layer left and gives the unmerged outputs.
    merged = load(config, run, record, allow_identity=False).model
    assert not quantized_layers(merged)
    unmerged = methods.load(config.method, load_base(config)[0], run.adapter, merge=False)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=tokens).logits, unmerged(input_ids=tokens).logits, atol=2e-5, rtol=1e-4
        )
    merge_main([str(run.root), "--out", str(tmp_path / "merged")])
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(saved(input_ids=tokens).logits, merged(input_ids=tokens).logits)

    # Requantised: the same base where nothing was trained, and the rounding error is printed.
    capsys.readouterr()
    merge_main([str(run.root), "--out", str(tmp_path / "packed"), "--to-grid"])
    assert "rounding lost" in capsys.readouterr().out
    packed = load_quantized(tmp_path / "packed")
    original = quantized_layers(load_base(config)[0])
    lost = read_json(tmp_path / "packed" / "quantization.json")["lost"]
    for name, layer in quantized_layers(packed).items():
        assert (name in lost) == (name.rpartition(".")[2] in (config.task.target_modules or ()))
        found, before = layer.quantized(), original[name].quantized()
        assert torch.equal(found.scales, before.scales)
        assert name in lost or torch.equal(found.codes, before.codes)

    # The next run, with another seed, uses the same base.
    before = made.stat().st_mtime_ns
    assert train(planned([*own_cache, *FEW, *arguments, "seed=1"])).base_hash == base["hash"]
    assert [path.stat().st_mtime_ns for path in bases(tmp_path / "cache")] == [before]


def test_what_cannot_be_merged_is_one_line(
    finished: RunPaths, own_cache: list[str], tmp_path: Path, fails_with: Callable[..., str]
) -> None:
    def merged(run: RunPaths, *arguments: str) -> str:
        return fails_with(lambda: merge_main([str(run.root), "--out", str(tmp_path / "out"), *arguments]))

    assert "--to-grid: the base of" in merged(finished, "--to-grid")
    run = planned([*own_cache, "method=prompt", "recipe.max_steps=1"])
    assert "not trained yet" in merged(run)
    train(run)
    assert "cannot be merged into the base's weights" in merged(run)
    merge_main([str(finished.root), "--out", str(tmp_path / "out")])
    assert "already exists" in merged(finished)
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_a_finished_run_finds_its_base_by_its_hash(own_cache: list[str], tmp_path: Path) -> None:
    """Also if today's code would give the folder another name; nothing is quantised again."""
    run = planned([*own_cache, *FEW, "method=diablo", "quantization=nf"])
    train(run)
    (made,) = bases(tmp_path / "cache")
    made.parent.rename(made.parent.with_name("made by other code"))
    evaluate(run)
    assert [path.parent.name for path in bases(tmp_path / "cache")] == ["made by other code"]


def test_another_quantised_base_is_refused(
    own_cache: list[str], tmp_path: Path, fails_with: Callable[..., str]
) -> None:
    run = planned([*own_cache, *FEW, "method=lora", "quantization=nf"])
    record = train(run)
    config = read_config(run)
    other = with_values(config, {"quantization.bits": 3})
    (made,) = bases(tmp_path / "cache")
    made.unlink()  # the run's own base is found by its hash
    said = fails_with(lambda: load(other, run, record, False))
    assert "was trained on a base model with hash" in said
    assert "runtime.cache_dir with its quantised base" in said


def test_a_damaged_base_is_refused(own_cache: list[str], fails_with: Callable[..., str]) -> None:
    config = config_of([*own_cache, "method=lora", "quantization=rtn"])
    folder = make_quantized(config, "cpu", progress=False)
    layer = folder / "layers" / "00001.safetensors"
    layer.write_bytes(layer.read_bytes()[:-1] + b"\0")
    line = fails_with(lambda: load_base(config))
    assert "00001.safetensors: missing or changed since it was written" in line
    assert f"delete {folder}" in line


@pytest.mark.parametrize("quantization", ["loftq", "apiq"])
def test_a_lora_that_was_made_with_the_weights_is_where_training_starts(
    own_cache: list[str], quantization: str
) -> None:
    few = [*CALIBRATED, "quantization.options.epochs=1"] if quantization == "apiq" else []
    config = config_of([*own_cache, "method=lora", f"quantization={quantization}", "quantization.bits=2", *few])
    base, _ = load_base(config)
    adapter = make_quantized(config, "cpu") / "adapter"
    made = load_file(adapter / "adapter_model.safetensors")
    model = methods.attach(config.method, base)
    trained = methods.trained_tensors(model)
    assert len(trained) == len(made) == 4 * 5 * 2  # layers, targets, A and B
    for name, tensor in made.items():
        assert torch.equal(trained[name.replace(".weight", ".default.weight")], tensor), name
        assert tensor.abs().sum() > 0, name
    known: Any = PeftConfig.from_pretrained(str(adapter))
    assert (known.r, known.lora_alpha, set(known.target_modules)) == (
        *((config.method.adapter or {})[key] for key in ("r", "lora_alpha")),
        set(config.task.target_modules or ()),
    )
    # o and gate are quantised too, though not trained.
    assert isinstance(base.get_submodule("model.layers.0.mlp.gate_proj"), QuantizedLinear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=full", "quantization=nf"], "method=full changes the weights or needs their gradients"),
        (["method=pissa", "quantization=nf"], "choose another method, or quantization=none"),
        (["method=dora", "quantization=loftq"], "dora starts otherwise: give method=lora"),
        (["method=diablo", "quantization=apiq"], "diablo starts otherwise: give method=lora"),
        (["method=base", "quantization=loftq"], "base starts otherwise: give method=lora"),
        (
            ["method=lora", "quantization=loftq", "quantization.options.rank=4"],
            "method.adapter.r=6: give both the same",
        ),
        (["method=lora", "quantization=loftq", "method.adapter.target_modules=all-linear"], "loftq needs a list"),
        (["quantization=nf", "quantization.bits=2.5"], "quantization.bits=2.5: it must be a whole number"),
        (["quantization=nf", "quantization.group_size=7"], "group_size=7 does not divide hidden_size=96"),
        (["method=lora", "quantization=nf8"], "no quantization 'nf8': did you mean nf?"),
        (["method=lora", "quantization=nf", "quantization.bit=2"], "no setting 'quantization.bit': did you mean bits"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_plan(
    arguments: list[str], message: str, fails_with: Callable[..., str]
) -> None:
    assert message in fails_with(lambda: plan(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantization=nf", "quantization.bits=9"],
            "quantization.bits=9: it must be a whole number of at least 2 and at most 8",
        ),
        (["quantization=nf", "quantization.group_size=64"], "group_size=64"),
        (["quantization=nf", "quantization.sym=true"], "sym=True: nf has no symmetric grid"),
        (["quantization=gptq", "quantization.calibration.length=100000"], "give a longer text"),
        (
            ["quantization=gptq", "quantization.calibration.samples=0"],
            "calibration.samples=0: it must be a whole number of at least 1",
        ),
        (["quantization=gptq", "quantization.calibration.text=gone.txt"], "calibration.text=gone.txt: no such file"),
        (["quantization=nf", "model=llama2_7b", "model.path=gone/model"], "llama2_7b: cannot load gone/model"),
        (["quantization=magr", "model=llama2_7b", "model.path=gone/model"], "llama2_7b: cannot load gone/model"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    small: list[str], arguments: list[str], message: str, fails_with: Callable[..., str]
) -> None:
    if "model=llama2_7b" in arguments:
        small = [override for override in small if not override.startswith("model.")]
    assert message in fails_with(
        lambda: make_quantized(config_of([*small, "method=lora", *arguments]), "cpu", progress=False)
    )


def test_attaching_what_changes_the_weights_is_one_line(small: list[str]) -> None:
    config = config_of([*small, "method=lora", "quantization=nf"])
    pissa = config_of([*small, "method=pissa"]).method
    with pytest.raises(UserError, match="pissa-r6 on llama: the weight is made from quantised codes"):
        methods.attach(pissa, load_base(config)[0])


def test_no_quantization_adds_nothing_and_others_are_part_of_the_run_id() -> None:
    plain = config_of(["method=lora"])
    assert config_of(["method=lora", "quantization=none"]) == plain
    assert "quantization" not in plain.mapping
    ids = [config_of(["method=lora", "quantization=nf", f"quantization.bits={bits}"]).run_id for bits in (2, 4)]
    assert [name.rsplit("-", 1)[0] for name in ids] == [f"tiny-lora-r6-nf{bits}-arith-s0" for bits in (2, 4)]
    wider = config_of(["method=lora", "quantization=nf", "quantization.group_size=48"]).run_id
    assert len({plain.run_id, *ids, wider}) == 4


def test_a_stopped_quantisation_goes_on_after_its_last_layer(
    own_cache: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of([*own_cache, "method=lora", "quantization=gptq", *CALIBRATED])
    folder = make_quantized(config, "cpu", progress=False)
    (made,) = bases(tmp_path / "cache")
    whole = json.loads(made.read_text(encoding="utf-8"))
    for path in (made, *folder.glob("layers/0000[23]*")):  # the state after two of four layers
        path.unlink()
    worked: list[str] = []
    quantize = diablo.quantize.model._quantize_each
    monkeypatch.setattr(
        diablo.quantize.model, "_quantize_each", lambda name, *rest: worked.append(name) or quantize(name, *rest)
    )
    base: Any = load_quantized_base(config, "cpu")[0]
    assert worked == ["model.layers.2", "model.layers.3"]
    assert base.quantization["hash"] == whole["hash"]
    assert not (folder / "lock").exists()


def test_a_file_can_be_what_is_calibrated_with(own_cache: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ann has 3 apples and finds 4. " * 40, encoding="utf-8")
    arguments = [*own_cache, "method=lora", "quantization=gptq", *CALIBRATED]
    rows = make_quantized(config_of(arguments), "cpu", progress=False)
    file = make_quantized(config_of([*arguments, f"quantization.calibration.text={text}"]), "cpu", progress=False)
    assert rows != file
    hashes = [json.loads((folder / "quantization.json").read_text(encoding="utf-8"))["hash"] for folder in (rows, file)]
    assert hashes[0] != hashes[1]


def test_the_command_makes_the_bases_of_runs_ahead(
    own_cache: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], fails_with: Callable[..., str]
) -> None:
    main([*own_cache, "method=lora,diablo", "quantization=rtn", "quantization.bits=4,2", "seed=0,1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bases(tmp_path / "cache")) == 2  # independent of the trained method
    assert "4.750 bits per quantised weight" in lines[0]
    run = planned([*own_cache, *FEW, "method=lora", "quantization=rtn", "quantization.bits=2"])
    main([str(run.root)])
    assert capsys.readouterr().out.splitlines() == [lines[1]]
    assert "no run here has a quantised base" in fails_with(lambda: main([*own_cache]))


def test_the_dry_run_says_bytes_from_shapes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.plan.__main__ import main as plan_main

    plan_main(
        [
            *("--dry-run", "model=llama2_7b", "task=math_10k", "method=diablo", "recipe.learning_rate=1e-4"),
            *("quantization=magr", "quantization.bits=2"),
        ]
    )
    # 32 layers of 4 × 4096² + 3 × 4096 × 11008 weights at 2 + 24/64 bits; embeddings, output layer and norms in bf16.
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 19 // 64
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("llama2_7b, diablo-N64-magr2"))
    base = int(line.split("base ")[1].split(" bytes")[0].replace(",", ""))
    assert 0 <= base - packed - 2 * (2 * 32000 * 4096 + 65 * 4096) < 1000  # and the rotary frequencies
    assert "(2.375 bits per quantised weight" in line
    assert "adapter 281,018,368, gradients and AdamW's state 843,055,104" in line


@pytest.mark.slow
def test_the_four_benchmarks_of_math_10k_on_a_quantised_base(data_root: Path, cache_dir: Path, tmp_path: Path) -> None:
    """With the protocol of Math10K, trained on the open stand-in for its rows."""
    own = [f"runtime.{key}={value}" for key, value in (("data_root", data_root), ("runs_dir", tmp_path / "runs"))]
    own += [f"runtime.cache_dir={cache_dir}", "runtime.device=cpu", "model.pretraining.steps=4"]
    brief = ["recipe.max_steps=2", "recipe.micro_batch_size=4", "recipe.batch_size=4", "protocol.max_length=256"]
    brief += ["evaluation.limit=2", "evaluation.generation.max_new_tokens=8", "recipe.learning_rate=0.01"]
    run = planned([*own, *brief, *CALIBRATED, "task=gsm8k_mawps", "quantization=magr", "quantization.bits=2"])
    assert train(run).changed
    scores = evaluate(run)
    benchmarks = config_of([*own, "task=math_10k", "recipe.learning_rate=0.01"]).evaluation.benchmarks
    assert tuple(score.benchmark for score in scores) == benchmarks
    assert {(score.n, score.protocol, score.identity) for score in scores} == {(2, "pyreft", False)}
