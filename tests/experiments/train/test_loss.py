"""The loss computed in chunks of labelled positions (experiments/train/loss.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM

from diablo import DiabloConfig
from experiments.data.prompts import IGNORED
from experiments.train import loss as chunked
from experiments.train.loss import TargetForward, Targets
from tests.diablo.blocks.test_diablo_tuner import tiny_llama


@pytest.fixture(params=[1, 3, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set and return the positions per chunk for a vocabulary of 64 entries."""
    monkeypatch.setattr(chunked, "LOGITS", 64 * request.param)
    return request.param


def batch(vocabulary: int, rows: int = 3, tokens: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def definition(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean over targets from all logits in their own dtype; transformers' loss is in float32."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logits = logits[:, -inputs["labels"].shape[1] : -1]
    return functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", ["all", "diablo", "head", "prompt"])
def test_value_and_gradients_are_those_of_the_models_own_loss(what: str, tied: bool, chunk: int) -> None:
    model: Any = tiny_llama(tied=tied).double()
    if what == "prompt":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    elif what != "all":
        targets = ["lm_head"] if what == "head" else ["q_proj", "down_proj"]
        model = get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=targets, init_weights=False)).double()
    inputs = batch(model.config.vocab_size)
    own = definition(model, inputs)
    own.backward()
    expected = gradients(model)
    forward = TargetForward(model)
    assert forward.is_plain
    targets = forward(model, inputs)
    found = targets.loss(len(targets.tokens))
    found.backward()
    assert float(found.detach()) == pytest.approx(float(own.detach()), abs=1e-12)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_logits_that_are_changed_behind_the_output_layer() -> None:
    """Gemma 2 caps its logits, so the model's own logits are used there."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, final_logit_softcapping=2.0,
    )  # fmt: skip
    model: Any = Gemma2ForCausalLM(config).double()
    torch.nn.init.normal_(model.lm_head.weight)
    inputs = batch(64)
    forward = TargetForward(model)
    assert not forward.is_plain
    targets = forward(model, inputs)
    found = targets.loss(len(targets.tokens))
    found.backward()
    got = gradients(model)
    own = definition(model, inputs)
    own.backward()
    assert float(found.detach()) == pytest.approx(float(own.detach()), abs=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_no_more_logits_at_a_time_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(chunked, "LOGITS", 2 * model.config.vocab_size)
    sizes = []
    model.lm_head.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    targets = TargetForward(model)(model, batch(model.config.vocab_size))
    sizes.clear()
    targets.loss(1.0).backward()
    assert sum(sizes) == len(targets.tokens) * model.config.vocab_size
    assert max(sizes) == 2 * model.config.vocab_size


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    model = tiny_llama()
    inputs = batch(model.config.vocab_size)
    targets = TargetForward(model)(model, inputs | {"labels": torch.full_like(inputs["labels"], IGNORED)})
    found = targets.loss(1.0)
    found.backward()
    assert float(found.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert targets.row_scores().tolist() == [[0, 0, 1]] * 3


def test_bfloat16_rounds_no_more_than_the_models_own_loss() -> None:
    inputs = batch(64, rows=8, tokens=33)
    exact: Any = tiny_llama().double()
    definition(exact, inputs).backward()
    reference = gradients(exact)
    errors = []
    for own in (True, False):
        model: Any = tiny_llama().bfloat16()
        if own:
            model(**inputs).loss.backward()
        else:
            targets = TargetForward(model)(model, inputs)
            targets.loss(len(targets.tokens)).backward()
        errors.append(sum((gradient.double() - reference[name]).norm() for name, gradient in gradients(model).items()))
    assert errors[1] < 1.2 * errors[0]


def test_row_scores_are_the_definition(chunk: int) -> None:
    """Against float64 sums over single tokens, also with the leading virtual tokens of a prompt method."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 64, generator=generator, dtype=torch.float64)
    labels = torch.randint(64, (3, 6), generator=generator)
    labels[0, :3] = labels[1, 4:] = IGNORED
    labels[2, 1:] = logits[2, 1:].argmax(-1)[:-1]  # a row whose targets are all predicted
    scores = Targets(logits, labels, lambda x: x, 64).row_scores()
    for row, (loss, tokens, match) in enumerate(scores.tolist()):
        expected, count, right = 0.0, 0, True
        for place in range(1, 6):
            target = int(labels[row, place])
            if target == IGNORED:
                continue
            found = logits[row, place]  # 7 - 6 virtual tokens: what is read at place - 1 stands at `place`
            expected += float(functional.cross_entropy(found, torch.tensor(target)))
            count, right = count + 1, right and int(found.argmax()) == target
        assert loss == pytest.approx(expected, rel=1e-9)
        assert (tokens, match) == (count, float(right))
        assert right == (row == 2)
