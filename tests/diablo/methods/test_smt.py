"""SMT: the warm-up chooses the right blocks and changes nothing else, and only these blocks are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import diablo
from diablo import SmtConfig
from diablo.methods.smt import block_scores, choose_blocks, top_blocks
from experiments.models.shapes import empty_base
from experiments.plan.compose import plan
from experiments.train import methods
from tests.diablo.blocks.test_diablo_tuner import adapted, tiny_llama, tokens, train
from tests.diablo.blocks.test_in_place import bits

SIZE = 8  # q is a grid of 4 × 4 blocks, k and v of 4 × 2
TARGETS = ["q_proj", "k_proj", "v_proj"]
MAX_NORM = 0.5  # less than the norm of the toy model's gradients


def config(num_blocks: int = 9, **fields: Any) -> SmtConfig:
    return SmtConfig(**({"num_blocks": num_blocks, "block_size": SIZE, "task_type": "CAUSAL_LM"} | fields))


def batches(seed: int = 0) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(64, (2, 9), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def backward(model: LlamaForCausalLM) -> Callable[[], None]:
    source = batches()
    return lambda: model(**next(source)).loss.backward()


def frozen_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = tiny_llama(dtype)
    model.requires_grad_(False)
    return model


def summed_gradients(steps: int, learning_rate: float) -> dict[str, Tensor]:
    """Return the targets' summed gradients from an ordinary training loop over a separate model."""
    model = tiny_llama().train()
    adam = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    sums: dict[str, Tensor] = {}
    source = batches()
    for _ in range(steps):
        adam.zero_grad()
        model(**next(source)).loss.backward()
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                gradient: Any = module.weight.grad
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        adam.step()
    return sums


# The choice


@pytest.mark.parametrize("score", ["mean_abs", "abs_mean"])
def test_the_blocks_of_the_largest_summed_gradients_are_chosen(score: str) -> None:
    """Every block is scored separately. The learning rate is high enough that the steps change the gradients."""
    scores = {}
    for name, total in summed_gradients(4, 1e-2).items():
        for row in range(total.shape[1] // SIZE):
            for column in range(total.shape[0] // SIZE):
                block = total.T[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
                value = abs(block.mean()) if score == "mean_abs" else block.abs().mean()
                scores[name, row, column] = value.item()
    assert len(scores) == 2 * (16 + 8 + 8)
    best = sorted(scores, key=lambda place: scores[place], reverse=True)[:9]
    model = frozen_llama()
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "max_grad_norm": MAX_NORM, "score": score}
    prepared = choose_blocks(model, config(), backward(model), **settings)
    assert prepared.blocks is not None
    assert {(name, *place) for name, positions in prepared.blocks.items() for place in positions} == set(best)


def test_a_score_is_of_the_block_in_that_place() -> None:
    """A weight of 2 outputs and 4 inputs with blocks of 2 × 2; grid rows are input features."""
    total = torch.tensor([[1.0, -1.0, 2.0, 2.0], [1.0, -1.0, 2.0, -4.0]])
    assert block_scores(total, 2, "mean_abs").tolist() == [[0.0], [0.5]]
    assert block_scores(total, 2, "abs_mean").tolist() == [[1.0], [2.5]]
    with pytest.raises(ValueError, match="score='max': choose one of"):
        block_scores(total, 2, "max")


def test_ties_go_to_the_first_name_row_and_column() -> None:
    scores = {"b": torch.tensor([[1.0, 2.0], [1.0, 1.0]]), "a": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
    assert top_blocks(scores, 1) == {"b": [[0, 1]]}
    assert top_blocks(scores, 4) == {"a": [[0, 1], [1, 0]], "b": [[0, 0], [0, 1]]}
    assert top_blocks(scores, 5) == {"a": [[0, 1], [1, 0]], "b": [[0, 0], [0, 1], [1, 0]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_afterwards_what_it_was(dtype: torch.dtype) -> None:
    model = frozen_llama(dtype)
    model.model.layers[1].train()  # modules in different modes
    model.lm_head.weight.requires_grad_(True)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    memory = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    prepared = choose_blocks(model, config(), backward(model), steps=3, learning_rate=1e-2)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == memory
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    attached = get_peft_model(model, prepared)
    losses = train(attached)  # the base still accepts gradients of its own dtype
    assert losses[-1] < losses[0]


def test_the_base_is_what_it_was_also_after_an_error() -> None:
    model = frozen_llama()
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    few = iter([backward(model)] * 2)
    with pytest.raises(StopIteration):
        choose_blocks(model, config(), lambda: next(few)(), steps=3, learning_rate=1e-2)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_config_that_was_given_is_left_alone() -> None:
    given = config()
    model = frozen_llama()
    prepared = choose_blocks(model, given, backward(model), steps=1)
    assert given.blocks is None
    assert prepared.target_modules is None
    assert prepared.blocks is not None
    assert sum(len(positions) for positions in prepared.blocks.values()) == 9


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"num_blocks": 65}, {}, "num_blocks=65 exceeds the 64 blocks of 8 × 8"),
        ({"block_size": 5}, {}, "block_size=5 does not divide in_features=32 and out_features=32"),
        ({"target_modules": ["query"]}, {}, "query matches no module of LlamaForCausalLM"),
        ({"target_modules": ["embed_tokens"]}, {}, "'embed_tokens'.* matches no linear layer of LlamaForCausalLM"),
        ({}, {"score": "max"}, "score='max': choose one of mean_abs, abs_mean"),
        ({}, {"learning_rate": 1e30, "steps": 3}, "gradient of .* is not finite: lower its learning rate"),
    ],
)
def test_what_cannot_be_chosen_is_refused(fields: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    model = frozen_llama()
    with pytest.raises(ValueError, match=message):
        choose_blocks(model, config(**fields), backward(model), **{"steps": 1, **settings})


def test_a_model_with_weights_needs_batches() -> None:
    with pytest.raises(ValueError, match="num_blocks=9: choosing blocks needs 100 steps on training rows"):
        choose_blocks(frozen_llama(), config(), None)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=0 must be at least 1"):
        config(0)


# The count


def test_890_blocks_are_the_papers_share_of_llama2_7b() -> None:
    architecture = plan(["model=llama2_7b"])[0].model.architecture
    base = empty_base(architecture)
    total = base.num_parameters()
    prepared = choose_blocks(base, SmtConfig(task_type="CAUSAL_LM"), None)
    model = get_peft_model(base, prepared, low_cpu_mem_usage=True)
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 890 * 256 * 256 == 58_327_040
    assert round(100 * trained / total, 2) == 0.87
    with pytest.raises(ValueError, match="exceeds the 24576 blocks"):  # 32 layers, 3 weights of 16 × 16 blocks
        choose_blocks(empty_base(architecture), SmtConfig(num_blocks=24577), None)


def test_the_tiny_model_trains_as_much_as_with_diablo() -> None:
    counts = []
    for name in ("smt", "diablo"):
        (run,) = plan([f"method={name}"])
        base = empty_base(run.model.architecture)
        adapter = methods.peft_config(run.method.adapter or {})
        if isinstance(adapter, SmtConfig):
            adapter = choose_blocks(base, adapter, None)
        counts.append(get_peft_model(base, adapter, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0])
    assert counts == [27_648, 27_648]


# The layer


def attach(**fields: Any) -> Any:
    model = frozen_llama()
    prepared = choose_blocks(model, config(**fields), backward(model), steps=2)
    return get_peft_model(frozen_llama(), prepared)


def test_only_the_chosen_blocks_are_trained_and_other_layers_are_untouched() -> None:
    model = attach(num_blocks=3)
    blocks = model.peft_config["default"].blocks
    assert {f"base_model.model.{name}" for name in blocks} == adapted(model).keys()
    assert len(blocks) < 6
    train(model)
    before = dict(tiny_llama().named_parameters())
    merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():
        changed = (weight != before[name]).T if weight.dim() == 2 else weight != before[name]
        expected = torch.zeros_like(changed)
        for row, column in blocks.get(name.removesuffix(".weight"), []):
            expected[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] = True
        assert torch.equal(changed, expected), name


def test_gradients_are_those_of_full_fine_tuning_in_the_blocks() -> None:
    model, full = attach(), tiny_llama()
    for one in (model, full):
        one(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, layer in adapted(model).items():
        weight: Any = full.get_submodule(name.removeprefix("base_model.model.")).weight
        gradient: Any = layer.diablo_blocks["default"].grad
        positions = model.peft_config["default"].blocks[name.removeprefix("base_model.model.")]
        for (row, column), block in zip(positions, gradient, strict=True):
            expected = weight.grad.T[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
            torch.testing.assert_close(block, expected)


def test_saved_and_loaded_on_a_fresh_base_computes_the_same(tmp_path: Path) -> None:
    model = attach()
    train(model)
    logits = model(tokens()).logits
    model.save_pretrained(str(tmp_path))
    loaded: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(loaded(tokens()).logits, logits)
    assert loaded.peft_config["default"].blocks == model.peft_config["default"].blocks
    assert torch.equal(loaded.merge_and_unload()(tokens()).logits, logits)


def test_without_a_choice_nothing_is_attached() -> None:
    with pytest.raises(
        ValueError, match=r"q_proj: no blocks are chosen yet: attach the config that diablo\.smt\.choose_blocks"
    ):
        get_peft_model(frozen_llama(), config())


def test_a_block_outside_the_grid_is_refused() -> None:
    wrong = config(blocks={"model.layers.0.self_attn.k_proj": [[0, 0], [0, 2]]})
    with pytest.raises(ValueError, match=r"k_proj: blocks \[\[0, 2\]\] are not in the layer's grid of 4 × 2"):
        get_peft_model(copy.deepcopy(frozen_llama()), wrong)


def test_the_method_file_prepares_itself() -> None:
    """As in experiments: build the config, prepare it, attach it."""
    (run,) = plan(["method=smt", "model.adapter_size.smt_blocks=9", f"model.adapter_size.smt_block_size={SIZE}"])
    method = run.method
    prepare = dict(method.prepare or {})
    assert prepare.pop("_target_") == "diablo.smt.choose_blocks"
    assert diablo.smt.choose_blocks is choose_blocks
    base, settings = frozen_llama(), {**prepare, "steps": 2}
    prepared = choose_blocks(base, methods.peft_config(method.adapter or {}), backward(base), None, **settings)
    assert get_peft_model(base, prepared).get_nb_trainable_parameters()[0] == 9 * SIZE * SIZE
    assert method.label == "smt-n9"
