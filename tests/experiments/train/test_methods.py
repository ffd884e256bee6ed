"""The contract of a method, tested for every file in configs/method.

Exceptions are in the file's `contract` record: whether the method starts at the base's outputs, whether
the trained parameters can be merged into the base's weights (`merges`), whether attaching changes these weights,
and, if it does not, whether the method trains under gradient checkpointing, on a quantised base, over several processes
(`ddp`, `fsdp2`: tests/experiments/train/test_sharding.py) and compiled. `python -m experiments.methods` prints it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from diablo.quantize import QuantizedLinear, quantized_layers, round_to_nearest
from diablo.quantize.quantized_linear import set_module
from experiments.config import Method, RunConfig
from experiments.errors import UserError
from experiments.methods import contract_of, row_of
from experiments.models.shapes import build_config
from experiments.plan.compose import options, plan
from experiments.plan.counting import count
from experiments.settings import with_values
from experiments.train import methods
from experiments.train.preparation import Backward
from tests.diablo.quantized_models import decoder_linears

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Starting from a decomposition of W, and W - BA + BA, differ by float32 rounding.
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}

every_method = pytest.mark.parametrize("name", options("method"))
every_contract = {"starts_at_base", "merges", "changes_base_at_start"}
every_exception = {"gradient_checkpointing", "on_quantized", "ddp", "fsdp2", "compile"}
training_methods = pytest.mark.parametrize("name", [name for name in options("method") if name != "base"])


def config_of(name: str) -> RunConfig:
    (config,) = plan(
        [
            f"method={name}",
            "model.adapter_size.num_blocks=4",
            "model.adapter_size.rank=4",
            "model.adapter_size.smt_blocks=6",
        ]
    )
    return config


def fields_of(name: str) -> set[str]:
    """Return the fields of the method's config class."""
    adapter = config_of(name).method.adapter
    return set() if adapter is None else {field.name for field in dataclasses.fields(methods.peft_config(adapter))}


on_quantized = [name for name in options("method") if name != "base" and contract_of(name).get("on_quantized", True)]


def fresh_base(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    set_seed(0)
    return AutoModelForCausalLM.from_config(build_config(ARCHITECTURE)).to(dtype).eval()


def attached(name: str, base: PreTrainedModel | None = None, **fields: Any) -> Any:
    """Return the method on a base, prepared with random tokens and, if needed, an adapter of its first method.

    Args:
        fields: other values of the adapter's fields.
    """
    config = with_values(config_of(name), {f"method.adapter.{key}": value for key, value in fields.items()})
    method, base = config.method, base or fresh_base()
    with tempfile.TemporaryDirectory() as folder:
        first = first_adapter(method, base.dtype, Path(folder)) if method.prerequisite else None
        set_seed(1)
        return methods.attach(method, base, random_backward(base), first).eval()


def first_adapter(method: Method, dtype: torch.dtype, folder: Path) -> Path:
    set_seed(1)
    assert method.prerequisite is not None
    before = method.prerequisite.method
    base = fresh_base(dtype)
    model = methods.attach(before, base, random_backward(base))
    initial = methods.initial_state(model)
    train_a_little(model)
    methods.save(before, model, folder, initial)
    return folder


def random_backward(base: PreTrainedModel) -> Backward:
    def steps() -> Iterator[list[dict[str, torch.Tensor]]]:
        generator = torch.Generator().manual_seed(3)
        while True:
            tokens = torch.randint(64, (2, 12), generator=generator)
            yield [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}]

    return Backward(base, steps())


def batch() -> torch.Tensor:
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of the batch's own tokens, without those of prompt tuning's leading virtual tokens."""
    with torch.no_grad():
        return model(input_ids=batch()).logits[:, -batch().shape[1] :]


def train_a_little(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(methods.trained_tensors(model).values(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def base_weights(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the base's own tensors in an attached model, under the same name whether wrapped or not.

    Args:
        names: names of the base's state dict; by default those of the toy model.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items()}
    return {name: found[name].clone() for name in names or fresh_base().state_dict()}


def test_every_contract_says_all_three_things() -> None:
    for name in options("method"):
        assert contract_of(name).keys() - every_exception == every_contract, name


@every_method
def test_attaching_changes_no_output_where_the_contract_says_so(name: str) -> None:
    same = torch.allclose(logits(attached(name)), logits(fresh_base()), **TOLERANCE)
    assert same == contract_of(name)["starts_at_base"]


@every_method
def test_the_base_changes_at_the_start_only_where_the_contract_says_so(name: str) -> None:
    before, after = fresh_base().state_dict(), base_weights(attached(name))
    changed = any(not torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert changed == contract_of(name)["changes_base_at_start"]


@training_methods
def test_only_what_is_trained_changes(name: str) -> None:
    model = attached(name)
    trained = methods.trained_tensors(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_a_little(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in trained), key


@every_method
def test_trainable_parameters_equal_the_count_from_the_architecture(name: str) -> None:
    config = config_of(name)
    config = with_values(config, {"model.architecture": ARCHITECTURE})
    counted = count(config)
    assert sum(tensor.numel() for tensor in methods.trained_tensors(attached(name)).values()) == counted.trainable
    assert fresh_base().num_parameters() == counted.base
    assert (counted.trainable == 0) == (name == "base")


@every_method
@pytest.mark.parametrize("merge", [True, False])
def test_saved_and_loaded_on_a_fresh_base_gives_the_same_outputs(name: str, merge: bool, tmp_path: Path) -> None:
    method = config_of(name).method
    model = attached(name)
    initial = methods.initial_state(model)
    if name != "base":
        train_a_little(model)
        assert not torch.allclose(logits(model), logits(fresh_base()), **TOLERANCE)
    expected = logits(model)
    methods.save(method, model, tmp_path / "adapter", initial)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)  # saving does not change the live model
    if merge and not contract_of(name)["merges"]:
        with pytest.raises(UserError, match="cannot be merged into the base's weights"):
            methods.load(method, fresh_base(), tmp_path / "adapter", merge=merge)
        return
    loaded = methods.load(method, fresh_base(), tmp_path / "adapter", merge=merge).eval()
    torch.testing.assert_close(logits(loaded), expected, **TOLERANCE)


@every_method
def test_a_run_is_scored_merged_where_the_contract_says_so(name: str) -> None:
    assert config_of(name).evaluation.merge == contract_of(name)["merges"]


@pytest.mark.parametrize(
    "name", [name for name in options("method") if contract_of(name)["merges"] and name not in ("base", "full")]
)
def test_merged_equals_unmerged_and_unmerge_restores(name: str) -> None:
    model = attached(name)
    train_a_little(model)
    expected, weights = logits(model), base_weights(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    model.merge_adapter()  # a second call is harmless
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    for key, tensor in base_weights(model).items():
        torch.testing.assert_close(tensor, weights[key], **TOLERANCE)


@training_methods
def test_gradients_under_accumulation_equal_those_of_the_whole_batch(name: str) -> None:
    whole, parts = attached(name), attached(name)
    whole(input_ids=batch(), labels=batch()).loss.backward()
    for row in batch():
        (parts(input_ids=row[None], labels=row[None]).loss / len(batch())).backward()
    for (key, one), other in zip(
        methods.trained_tensors(whole).items(), methods.trained_tensors(parts).values(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=key)


@training_methods
def test_gradients_under_checkpointing_are_the_same(name: str) -> None:
    plain = attached(name).train()
    saving = attached(name).train()
    method = config_of(name).method
    if not contract_of(name).get("gradient_checkpointing", True):
        with pytest.raises(UserError, match="checkpointing disables"):
            methods.check_checkpointing(method, saving)
        return
    methods.check_checkpointing(method, saving)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, saving):
        model(input_ids=batch(), labels=batch()).loss.backward()
    for one, other in zip(
        methods.trained_tensors(plain).values(), methods.trained_tensors(saving).values(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.slow
@training_methods
def test_the_compiled_model_has_the_same_gradients_where_the_contract_says_so(name: str) -> None:
    """The captured graph runs uncompiled (`aot_eager`), since inductor needs a C++ compiler or a GPU."""
    eager, compiled = attached(name).train(), attached(name).train()
    torch.compiler.reset()
    run: Any = torch.compile(compiled, backend="aot_eager")
    for model in (eager, run):
        model(input_ids=batch(), labels=batch()).loss.backward()
    gradients: list[list[Any]] = [
        [tensor.grad for tensor in methods.trained_tensors(model).values()] for model in (eager, compiled)
    ]
    same = all(torch.allclose(one, other, atol=1e-6, rtol=1e-4) for one, other in zip(*gradients, strict=True))
    assert same == contract_of(name).get("compile", True)


@training_methods
def test_the_table_says_which_methods_train_in_place(name: str) -> None:
    mode: dict[str, Any] = {"mode": "in_place"} if "mode" in fields_of(name) else {}
    modes = set(methods.forward_modes(attached(name, **mode)).values())
    assert modes == ({"in_place"} if row_of(name)["In place"] == "yes" else set())


@training_methods
def test_the_table_says_which_methods_have_dropout(name: str) -> None:
    """With dropout, two passes in training differ once something is trained."""
    dropout: dict[str, Any] = {key: 0.5 for key in ("dropout", "lora_dropout") if key in fields_of(name)}
    model = attached(name, **dropout)
    train_a_little(model)
    model.train()
    differ = not torch.equal(logits(model), logits(model))
    assert differ == (row_of(name)["Dropout"] == "yes")


@training_methods
def test_the_table_says_which_methods_need_rows_or_another_run(name: str, tmp_path: Path) -> None:
    method, base = config_of(name).method, fresh_base()
    first = first_adapter(method, base.dtype, tmp_path) if method.prerequisite else None
    backward, calls = random_backward(base), 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        backward()

    methods.attach(method, base, counted, first)
    assert (calls > 0) == (row_of(name)["Needs rows"] == "yes")
    assert (first is not None) == (row_of(name)["Needs run"] != "")


@training_methods
def test_trains_under_bf16_autocast_with_float32_parameters(name: str) -> None:
    """As on a GPU: a bf16 base (float32 for full fine-tuning), trained parameters in float32, autocast to bf16."""
    dtype = torch.float32 if config_of(name).method.trains == "all" else torch.bfloat16
    model = attached(name, fresh_base(dtype)).train()
    trained = methods.trained_tensors(model)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    before = copy.deepcopy({key: tensor.detach() for key, tensor in trained.items()})
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batch(), labels=batch()).loss
    loss.backward()
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    assert torch.isfinite(loss)
    changed = [key for key, tensor in trained.items() if not torch.equal(tensor, before[key])]
    # If B starts at zero, A's first gradient is zero, and vice versa.
    assert len(changed) >= len(trained) / 2


def quantized_base() -> PreTrainedModel:
    base = fresh_base()
    for name, linear in decoder_linears(base).items():
        set_module(base, name, QuantizedLinear.from_weight(round_to_nearest(linear.weight, 4, 16)))
    return base


@pytest.mark.parametrize("name", on_quantized)
def test_on_a_quantised_base_the_codes_stay_and_loading_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    method, base = config_of(name).method, quantized_base()
    model = attached(name, base)
    if contract_of(name)["starts_at_base"]:
        torch.testing.assert_close(logits(model), logits(quantized_base()), **TOLERANCE)
    initial, trained = methods.initial_state(model), methods.trained_tensors(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_a_little(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in trained), key
    expected = logits(model)
    assert not torch.allclose(expected, logits(quantized_base()), **TOLERANCE)
    methods.save(method, model, tmp_path / "adapter", initial)
    for merge in (False, True) if contract_of(name)["merges"] else (False,):
        loaded = methods.load(method, quantized_base(), tmp_path / "adapter", merge=merge).eval()
        assert (not quantized_layers(loaded)) == merge
        torch.testing.assert_close(logits(loaded), expected, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in options("method") if name not in ("base", *on_quantized)])
def test_other_methods_are_refused_on_a_quantised_base(name: str) -> None:
    with pytest.raises(UserError, match=f"method={name} changes the weights or needs their gradients"):
        plan([f"method={name}", "quantization=nf"])


def test_an_untrained_quantised_base_merges_to_full_precision(tmp_path: Path) -> None:
    loaded = methods.load(config_of("base").method, quantized_base(), tmp_path, merge=True)
    assert not quantized_layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(quantized_base()), **TOLERANCE)


def test_an_adapter_for_other_shapes_is_refused(tmp_path: Path) -> None:
    method = config_of("diablo").method
    methods.save(method, attached("diablo"), tmp_path / "adapter", {})
    from transformers import AutoModelForCausalLM

    other: Any = AutoModelForCausalLM.from_config(build_config({**ARCHITECTURE, "intermediate_size": 64}))
    with pytest.raises(UserError, match="does not fit the base model"):
        methods.load(method, other, tmp_path / "adapter", merge=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["diablo", "lora", "prompt", "full"])
def test_what_is_not_finite_is_refused_with_file_and_tensor(name: str, value: float, tmp_path: Path) -> None:
    method, model = config_of(name).method, attached(name)
    methods.save(method, model, tmp_path / "adapter", methods.initial_state(model))
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    tensors = load_file(file)
    broken = sorted(tensors)[-1]
    tensors[broken].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    for merge in (False, True):
        with pytest.raises(UserError, match=f"^{re.escape(f'{file}: {broken}')} has values that are NaN or infinite"):
            methods.load(method, fresh_base(), tmp_path / "adapter", merge=merge)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_file_that_was_cut_short_is_refused(name: str, tmp_path: Path) -> None:
    method, model = config_of(name).method, attached(name)
    methods.save(method, model, tmp_path / "adapter", {})
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: not a complete safetensors file"):
        methods.load(method, fresh_base(), tmp_path / "adapter", merge=False)


def test_an_adapter_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    method, model = config_of("lora").method, attached("lora")
    methods.save(method, model, tmp_path / "adapter", {})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit the base model: Found missing adapter keys"):
        methods.load(method, fresh_base(), tmp_path / "adapter", merge=True)
