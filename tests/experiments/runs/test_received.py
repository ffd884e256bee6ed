"""Run directories, adapters, checkpoints and bases from others: none of their code runs, no path leaves the folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from diablo.quantize.storage import RECORD, load_quantized
from diablo.quantize.storage import read_record as read_quantized
from eval.run import evaluate
from experiments.config import Gguf
from experiments.data.prompts import Asked, prompt_text
from experiments.models.gguf import converted
from experiments.models.load import load_base
from experiments.models.quantized import make_quantized
from experiments.plan.compose import plan
from experiments.runs.config_files import read_config, run_id, write_config
from experiments.runs.evaluations import kind_of
from experiments.runs.records import RunPaths, TrainRecord, read_record, trained_record
from experiments.settings import with_values
from experiments.train import checkpoint as checkpoints
from experiments.train import methods
from experiments.train.run import train
from tests.conftest import planned

Fails = Callable[[Callable[[], object]], str]
NAMES = [
    "evil.run",
    "os.system",
    "builtins.exec",
    "peftevil.Config",
    "diablo",
    "diablo..x",
    "peft.os;x",
    "",
    3,
    None,
    ["peft.X"],
]


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a module `evil` on the path that writes a file when imported; yield that file."""
    mark = tmp_path / "ran"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef run(*a, **k): ...\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield mark
    sys.modules.pop("evil", None)


def received(arguments: list[str], folder: Path, change: Callable[[dict[str, Any]], None]) -> RunPaths:
    """Make a run directory with a changed config and the run id of that config."""
    config = copy.deepcopy(dict(plan(arguments)[0].mapping))
    change(config)
    config["run_id"] = run_id(config)
    run = RunPaths(folder / config["run_id"])
    write_config(run, config)
    return run


def copied(run: RunPaths, folder: Path) -> RunPaths:
    return RunPaths(Path(shutil.copytree(run.root, folder / run.root.name)))


# Names of code


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("section", ["adapter", "prepare"])
def test_only_names_of_diablo_and_peft_are_read(
    section: str, target: object, small: list[str], tmp_path: Path, evil: Path, fails_with: Fails
) -> None:
    run = received([*small, "method=smt"], tmp_path, lambda config: config["method"][section].update(_target_=target))
    assert f"_target_={target}: only names in diablo and peft" in fails_with(lambda: train(run))
    assert not evil.exists()


def test_a_name_anywhere_in_a_config_is_checked(small: list[str], tmp_path: Path, fails_with: Fails) -> None:
    for place in ("task", "recipe", "model"):
        run = received(
            small, tmp_path, lambda config, place=place: config[place].update(more=[{"_target_": "os.system"}])
        )
        assert "only names in diablo and peft" in fails_with(lambda run=run: read_config(run))


@pytest.mark.parametrize(
    ("section", "target", "message"),
    [
        ("adapter", "diablo.lori.load_file", "only names in diablo and peft"),  # safetensors', imported there
        ("adapter", "diablo.lori.choose_entries", "not a config class"),
        ("prepare", "diablo.lori.torch", "only names in diablo and peft"),
        ("prepare", "diablo.DiabloConfig", "not a function"),
        ("prepare", "diablo.refresh", "method.prepare: "),
        ("prepare", "peft.utils.nothing.x", "no such function"),
    ],
)
def test_what_a_name_stands_for_is_checked(
    section: str, target: str, message: str, small: list[str], fails_with: Fails
) -> None:
    config = plan([*small, "method=smt"])[0]
    base, _ = load_base(config)
    config = with_values(config, {f"method.{section}._target_": target})
    assert message in fails_with(lambda: methods.attach(config.method, base))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("megatron_core", "evil"),
        ("megatron_config", {"a": 1}),
        ("lora_ga_config", {"cache_file": "/tmp/cache.pt"}),
        ("corda_config", {"covariance_file": "/tmp/cache.pt"}),
    ],
)
def test_an_adapter_names_no_code_and_no_files(
    field: str, value: object, finished: RunPaths, tmp_path: Path, small: list[str], evil: Path, fails_with: Fails
) -> None:
    config = plan([*small, "method=lora"])[0]
    adapter = {**(config.method.adapter or {}), field: value}
    assert "names code or files outside the adapter" in fails_with(lambda: methods.peft_config(adapter))
    run = copied(finished, tmp_path)
    path = run.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {field: value}), "utf-8")
    base, _ = load_base(read_config(run))
    said = fails_with(lambda: methods.load(read_config(run).method, base, run.adapter, merge=False))
    assert said.startswith(f"{path}.")
    assert "names code or files outside the adapter" in said
    assert not evil.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "modeling.py", "pytorch_model.bin", "config.json"])
def test_an_adapter_folder_holds_what_training_writes(
    name: str, finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    (run.adapter / name).write_bytes(b"{}")
    shutil.rmtree(run.root / "eval")
    assert f"{run.adapter / name}: training does not write such a file" in fails_with(lambda: evaluate(run))


def test_a_trained_model_is_of_the_bases_own_kind(small: list[str], tmp_path: Path, fails_with: Fails) -> None:
    """For full fine-tuning, neither the config beside the weights nor the paths in its index are trusted."""
    run = planned([*small, "method=full", "recipe.max_steps=1"])
    train(run)
    config = read_config(run)
    base, _ = load_base(config)
    path = run.adapter / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}), "utf-8")
    model = methods.load(config.method, base, run.adapter, merge=True)
    assert type(model) is type(base)
    (run.adapter / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../../other.safetensors"}}), "utf-8"
    )
    assert "'../../other.safetensors' is not the name of a file" in fails_with(
        lambda: methods.load(config.method, base, run.adapter, merge=True)
    )


def test_a_base_that_asks_for_code_is_refused_at_once(
    small: list[str], tmp_path: Path, evil: Path, fails_with: Fails
) -> None:
    """transformers would ask on the terminal and wait for an answer."""
    config = plan(small)[0]
    load_base(config)
    source = next((Path(config.runtime.cache_dir) / "base").glob("tiny-*"))
    folder = Path(shutil.copytree(source, tmp_path / "base"))
    config = with_values(config, {"model.path": str(folder), "model.pretraining": None})
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    shutil.copy(tmp_path / "code" / "evil.py", folder / "evil.py")
    started = time.monotonic()
    for change in (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
        {"attn_implementation": "someone/kernel"},
    ):
        (folder / "config.json").write_text(json.dumps(settings | change), "utf-8")
        said = fails_with(lambda: load_base(config))
        assert "custom code" in said or "someone/kernel" in said
    assert time.monotonic() - started < 10
    assert not evil.exists()


def test_finding_a_gguf_file_imports_nothing(tmp_path: Path, evil: Path, fails_with: Fails) -> None:
    for file in ("evil.sub/model.gguf", "llm/../../model.gguf", "/etc/passwd"):
        gguf = Gguf(package="evil==1", file=file, sha256="0" * 64)
        assert "not a file in a Python package" in fails_with(lambda gguf=gguf: converted(gguf, tmp_path))
    assert not evil.exists()


def test_a_config_alone_switches_no_sandbox_off(
    finished: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with: Fails
) -> None:
    """The received completions would run as programs."""
    run = copied(finished, tmp_path)
    changes = {"evaluation.sandbox": "none", "evaluation.benchmarks": ["human_eval"]}
    write_config(run, with_values(read_config(run), changes).mapping)
    assert "evaluation.sandbox=none in its config would run programs without protection" in fails_with(
        lambda: evaluate(run)
    )
    for allowed in ("command line", "environment"):  # continues until the benchmark's rows, which are missing
        overrides = ["runtime.data_root=null", *(["evaluation.sandbox=none"] if allowed == "command line" else [])]
        monkeypatch.setenv("DIABLO_SANDBOX", "none" if allowed == "environment" else "")
        monkeypatch.delenv("DIABLO_DATA_ROOT", raising=False)
        assert "without protection" not in fails_with(lambda overrides=overrides: evaluate(run, overrides))


# Paths


def test_links_out_of_the_folder_and_pipes_are_refused(finished: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "train.json").write_text("{}", "utf-8")
    for name in ("train.json", "adapter", "metrics.jsonl"):
        run = copied(finished, tmp_path / name)
        path = run.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(secret if name == "adapter" else secret / "train.json")
        assert f"{path}: a link out of {run.root}" in fails_with(lambda run=run: read_config(run))
        path.unlink()
        os.mkfifo(path)
        assert f"{path}: neither a file nor a folder" in fails_with(lambda run=run: read_config(run))
    run = copied(finished, tmp_path / "inside")
    (run.root / "again.json").symlink_to(run.train_record)
    (run.root / "loop").symlink_to(run.root)
    assert read_config(run).run_id == run.root.name


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "a/b", ""])
def test_records_name_files_of_their_own_folder(
    name: str, finished: RunPaths, tmp_path: Path, small: list[str], fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    record = json.loads(run.train_record.read_text("utf-8"))
    run.train_record.write_text(json.dumps(record | {"adapter_files": {name: "0" * 64}}), "utf-8")
    assert "is not the name of a file next to it" in fails_with(lambda: trained_record(run))
    assert "no benchmark" in fails_with(lambda: kind_of(f"../tasks/{name}"))


def test_a_checkpoint_with_a_path_or_a_foreign_file_is_passed_over(tmp_path: Path) -> None:
    aside = tmp_path / ".step"
    aside.mkdir()
    (aside / "weights.safetensors").write_bytes(b"x")
    final = checkpoints.folder(tmp_path / "checkpoints", 1)
    final.parent.mkdir()
    checkpoints.publish(aside, final, {})
    assert checkpoints.newest(final.parent, {}) == final
    (final / "scaler.pt").write_bytes(b"pickle")
    assert checkpoints.newest(final.parent, {}) is None
    (final / "scaler.pt").unlink()
    manifest = json.loads((final / "manifest.json").read_text("utf-8"))
    (tmp_path / "outside").write_bytes(b"x")
    manifest["files"]["../../outside"] = manifest["files"]["weights.safetensors"]
    (final / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert checkpoints.newest(final.parent, {}) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["files"].update({"../../secret": "0" * 64}),
        lambda record: record["files"].update({"/etc/passwd": "0" * 64}),
        lambda record: record["linears"].update({"x": {"bits": 4, "group_size": 32, "evil": True}}),
        lambda record: record.update(files=[1]),
        lambda record: record.pop("hash"),
    ],
)
def test_a_quantised_base_names_its_own_files(
    change: Callable[[dict[str, Any]], None], small: list[str], tmp_path: Path
) -> None:
    own = [
        *small,
        f"runtime.cache_dir={tmp_path / 'cache'}",
        "method=lora",
        "quantization=rtn",
        "model.pretraining.steps=1",
    ]
    folder = make_quantized(plan(own)[0], "cpu", progress=False)
    record = read_quantized(folder)
    assert record is not None
    change(record)
    (folder / RECORD).write_text(json.dumps(record), "utf-8")
    with pytest.raises(ValueError, match="no record of a quantised model"):
        load_quantized(folder)


# Files that block a reader or are not records


def test_a_config_that_unfolds_into_billions_is_refused(tmp_path: Path, small: list[str], fails_with: Fails) -> None:
    run = received(small, tmp_path, lambda config: None)
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    run.config.write_text("\n".join(lines), "utf-8")
    started = time.process_time()
    assert "more than 50,000 entries" in fails_with(lambda: read_config(run))
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"- " * 100_000,
        b"-\t" * 100_000,
        b"a: !!python/object/apply:os.system [ls]",
        b"- 1",
        b"1",
    ],
)
def test_a_config_that_is_none_is_one_line(content: bytes, tmp_path: Path, small: list[str], fails_with: Fails) -> None:
    run = received(small, tmp_path, lambda config: None)
    run.config.write_bytes(content)
    assert str(run.config) in fails_with(lambda: read_config(run))


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[1]", b"{", b"1" * 10_000])
def test_a_record_that_is_none_is_one_line(content: bytes, tmp_path: Path, fails_with: Fails) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    assert str(path) in fails_with(lambda: read_record(path, TrainRecord))


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", "4"), ("steps", 4.5), ("tensors", [1]), ("adapter_files", []), ("held_out", 1), ("changed", 1)],
)
def test_fields_of_a_record_have_their_types(
    field: str, value: object, finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    record = json.loads(run.train_record.read_text("utf-8"))
    run.train_record.write_text(json.dumps(record | {field: value}), "utf-8")
    assert f"{run.train_record}: {field} is no " in fails_with(lambda: read_record(run.train_record, TrainRecord))


@pytest.mark.parametrize(
    "template",
    ["{instruction:>99999999999}", "{instruction.__class__}", "{instruction[0]}", "{0}", "{instruction!r}", "{"],
)
def test_templates_only_name_fields(template: str, fails_with: Fails) -> None:
    rules = Asked("x", template, None, False)
    assert "its prompt cannot be filled" in fails_with(lambda: prompt_text(rules, {"instruction": "text"}))
    assert prompt_text(replace(rules, prompt="{{}} {instruction}"), {"instruction": "{x}"}) == "{} {x}"


def test_weights_that_are_cut_or_no_safetensors_are_one_line(
    finished: RunPaths, tmp_path: Path, fails_with: Fails
) -> None:
    run = copied(finished, tmp_path)
    path = run.adapter / "adapter_model.safetensors"
    config = read_config(run)
    base, _ = load_base(config)
    header = b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'
    for content in (b"\xff" * 100, len(header).to_bytes(8, "little") + header + bytes(4), b""):
        path.write_bytes(content)
        assert str(path) in fails_with(lambda: methods.load(config.method, base, run.adapter, merge=False))
    tensors = load_file(finished.adapter / "adapter_model.safetensors")
    save_file({name: tensor[..., :1].contiguous() for name, tensor in tensors.items()}, path)
    assert "does not fit the base model" in fails_with(
        lambda: methods.load(config.method, base, run.adapter, merge=False)
    )


def test_our_own_configs_pass(tmp_path: Path) -> None:
    """Every method's frozen config is accepted, including those of prepared and two-stage methods."""
    for method in ("smt", "lora_ga", "lori_s", "prefix", "full", "base"):
        run = received([f"method={method}", "recipe.learning_rate=1e-3"], tmp_path, lambda config: None)
        assert read_config(run).mapping == yaml.safe_load(run.config.read_text("utf-8"))
