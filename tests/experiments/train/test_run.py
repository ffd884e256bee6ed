"""The stages of a run on the real pipeline: train, resume, evaluate, report; and the errors of each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eval.run import evaluate
from experiments import ROOT
from experiments.runs.records import RunPaths, read_lines
from experiments.train import checkpoint as checkpoints
from experiments.train import trainer as trainer_module
from experiments.train.run import train
from tests.conftest import planned

Fails = Callable[[Callable[[], object]], str]


def files_of(run: RunPaths) -> dict[str, bytes]:
    """Return the files that a run produced, without clock fields."""
    content = {path.name: path.read_bytes() for path in run.adapter.iterdir()}
    steps = [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(run.metrics)]
    return {**content, "metrics": json.dumps(steps).encode()}


class Killed(BaseException):
    """Simulates the death of the process: no code may catch it."""


def train_until(run: RunPaths, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die after `step` optimizer steps."""
    log = trainer_module.RunTrainer.log

    def stopping(self: trainer_module.RunTrainer, *arguments: object, **more: object) -> None:
        log(self, *arguments, **more)  # pyright: ignore[reportArgumentType]
        if self.state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RunTrainer, "log", stopping)
        with pytest.raises(Killed):
            train(run)


def test_a_finished_run_holds_what_the_design_says(finished: RunPaths) -> None:
    record = train(finished)
    assert {path.name for path in finished.root.iterdir()} == {
        *("config.yaml", "adapter", "metrics.jsonl", "train.json", "held_out.json", "eval"),
        *("attempts.json", "heartbeat.json"),
    }
    assert set(record.adapter_files) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert record.steps == 16 and record.rows == 64  # noqa: PT018  64 rows, batches of 8, 2 epochs
    lines = list(read_lines(finished.metrics))
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert all(len(line["gradient_norms"]) == len(record.tensors) == 20 for line in lines)
    for line in lines:
        assert line["gradient_norm"] == pytest.approx(sum(norm**2 for norm in line["gradient_norms"]) ** 0.5, rel=1e-5)
    # Readable by others, regardless of safetensors' file mode.
    assert (finished.adapter / "adapter_model.safetensors").stat().st_mode & 0o044 == 0o044


def test_the_record_says_how_each_layer_computed(small: list[str]) -> None:
    record = train(planned([*small, "method=diablo", "method.adapter.num_blocks=4", "recipe.max_steps=1"]))
    layer = "base_model.model.model.layers.0."
    assert len(record.forward_modes) == 20
    assert record.forward_modes[f"{layer}self_attn.q_proj"] == "in_place"  # blocks of 24 × 24
    assert record.forward_modes[f"{layer}self_attn.k_proj"] == "adapter"  # blocks of 24 × 12
    record = train(planned([*small, "method=lora", "recipe.max_steps=1"]))
    assert record.forward_modes == {}


def test_the_number_of_blocks_can_be_left_to_a_budget(small: list[str], fails_with: Callable) -> None:
    automatic = [*small, "method=diablo", "method.adapter.num_blocks=auto", "recipe.max_steps=1"]
    record = train(planned([*automatic, "method.budget=0.2"]))
    assert 0.1 * record.base_parameters < record.trainable_parameters <= 0.2 * record.base_parameters
    message = "method.adapter.num_blocks=auto and method.budget=… (e.g. 0.005) belong together: give both"
    assert message in fails_with(lambda: train(planned(automatic)))
    assert message in fails_with(lambda: train(planned([*small, "method=diablo", "method.budget=0.07"])))


def test_a_finished_run_is_left_as_it_is(finished: RunPaths) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.root.rglob("*") if path.is_file()}
    train(finished)
    evaluate(finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "method",
    [
        ["method=diablo", "recipe.adapter_dropout=0.1"],
        ["method=diablo", "method.adapter.mode=in_place"],
        ["method=milora", "recipe.adapter_dropout=0.1"],
        ["method=full"],
        ["method=prefix"],
    ],
    ids=" ".join,
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    method: list[str], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*small, *method, "recipe.learning_rate=1e-2"]
    whole = planned([*arguments, "recipe.micro_batch_size=4"])
    train(whole)
    # Killed inside an epoch, at its end, and again, each time two checkpoints after the previous one.
    broken = planned(
        [
            *arguments,
            "recipe.micro_batch_size=4",
            "runtime.checkpoint_every=3",
            f"runtime.runs_dir={tmp_path / 'broken'}",
        ]
    )
    assert broken.root.name == whole.root.name
    for step in (5, 8, 13):
        train_until(broken, step, monkeypatch)
    record = train(broken)
    assert record.resumed_at == [3, 6, 12]
    assert files_of(broken) == files_of(whole)
    assert not broken.checkpoints.exists()


def test_optimizer_and_random_states_resume_bit_for_bit(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoints of a resumed and an uninterrupted training hold the same tensors."""
    states = []
    for name, stops in (("whole", [13]), ("broken", [5, 13])):
        run = planned(
            [*small, "recipe.adapter_dropout=0.1", "runtime.checkpoint_every=4", f"runtime.runs_dir={tmp_path / name}"]
        )
        for step in stops:
            train_until(run, step, monkeypatch)
        folder = checkpoints.folder(run.checkpoints, 12)
        states.append({path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))})
    whole, broken = states
    assert set(whole) == {"optimizer.safetensors", "random-0.safetensors", "weights.safetensors"}
    for name, tensors in whole.items():
        assert all(torch.equal(tensor, broken[name][key]) for key, tensor in tensors.items())


def test_a_damaged_checkpoint_is_passed_over(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned([*small, "runtime.checkpoint_every=4"])
    train_until(run, 13, monkeypatch)
    damaged = checkpoints.folder(run.checkpoints, 12) / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train(run).resumed_at == [8]


def test_a_checkpoint_of_other_data_is_not_resumed(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned([*small, "runtime.checkpoint_every=4"])
    train_until(run, 5, monkeypatch)
    manifest = checkpoints.folder(run.checkpoints, 4) / checkpoints.MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**content, "data_hash": "of other rows"}), encoding="utf-8")
    assert train(run).resumed_at == []


def test_a_killed_process_resumes(small: list[str]) -> None:
    """kill -9 in the middle of training, then the same command."""
    run = planned([*small, "recipe.epochs=12", "runtime.checkpoint_every=5"])
    command = [sys.executable, "-m", "experiments.train", str(run.root)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(run.checkpoints.glob("step-*")):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not run.train_record.exists(), "finished before it could be killed"
    record = train(run)
    assert record.steps == 96
    assert record.resumed_at
    assert record.resumed_at[0] > 0
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(1, 97))


def test_a_full_disk_keeps_the_last_checkpoint(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned([*small, "runtime.checkpoint_every=4"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    publish = checkpoints.publish
    calls: list[int] = []

    def second_time_full(*arguments: object) -> None:
        calls.append(1)
        (full if len(calls) == 2 else publish)(*arguments)  # pyright: ignore[reportCallIssue, reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "publish", second_time_full)
        with pytest.raises(OSError, match="No space left"):
            train(run)
    assert train(run).resumed_at == [4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.micro_batch_size=3", "recipe.batch_size=8 is not a multiple of recipe.micro_batch_size=3"),
        ("recipe.batch_size=80", "64 training rows do not fill one batch of 80"),
        ("runtime.device=cuda", "no CUDA device is visible"),
        ("task.data.train=100000", "problems are too many"),
        ("method.adapter.num_blocks=7", "num_blocks=7"),
        ("method.adapter.target_modules=[nothing]", "nothing"),
        ("+method.adapter.num_block=7", "did you mean num_blocks?"),
        ("protocol.prompt='{question}'", "its prompt needs the field 'question'"),
        ("model.architecture.hidden_size=100", "model.architecture: Class validation error"),
    ],
)
def test_bad_settings_say_what_and_how(override: str, message: str, small: list[str], fails_with: Fails) -> None:
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    arguments = small + ["recipe.micro_batch_size=80"] * override.startswith("recipe.batch_size")
    assert message in fails_with(lambda: train(planned([*arguments, override])))


def test_command_lines_print_one_line_and_status_one(small: list[str], tmp_path: Path) -> None:
    commands = [
        ["experiments.train", str(tmp_path / "none")],
        ["eval.run", str(planned(small).root)],
        ["experiments.plan", "method=nothing"],
        ["experiments.reproduce", "nothing"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    debugged = subprocess.run(
        [sys.executable, "-c", DEBUG, json.dumps(commands)],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert debugged.stderr.count("Traceback (most recent call last)") >= len(commands)


# In one process: what it raises would have been printed by Python.
DEBUG = """
import json, runpy, sys, traceback
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = [*arguments, "--debug"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        traceback.print_exc()
    else:
        sys.exit(f"{module} raised nothing")
"""
