"""S2FT: channels are drawn over the whole model, and training them equals training the permuted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from diablo import DiabloLinear, S2ftConfig
from diablo.blocks.patterns import draw_distinct, generator_for
from experiments.models.shapes import empty_base
from experiments.plan.compose import plan
from tests.diablo.blocks.test_diablo_tuner import adapted, tiny_llama, tokens, train

HEAD = 8  # features per head of tiny_llama, which has 4 query heads, 2 key and value heads, 48 neurons, 2 layers


def attach(**fields: Any) -> Any:
    base = tiny_llama()
    base.requires_grad_(False)
    return get_peft_model(base, S2ftConfig(task_type="CAUSAL_LM", **fields))


def chosen(model: Any, projection: str) -> dict[int, list[int]]:
    """Map layers to their chosen features: inputs for `down_proj` and `o_proj`, outputs for the others."""
    result = {}
    for name, layer in adapted(model).items():
        if name.endswith(projection):
            index: Any = layer.diablo_inputs if projection in ("down_proj", "o_proj") else layer.diablo_outputs
            result[int(name.split(".")[4])] = index["default"].flatten().tolist()
    return result


def changed_channels(layer: DiabloLinear, dim: int) -> list[int]:
    """Return the features with non-zero weights in the update."""
    nonzero = layer.get_delta_weight("default") != 0  # (out, in)
    assert torch.equal(nonzero.any(dim), nonzero.all(dim))
    return nonzero.any(dim).nonzero().flatten().tolist()


# The draw


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neurons_are_drawn_over_all_pairs_of_a_layer_and_a_neuron(seed: int) -> None:
    """The drawn numbers are indices into the ordered list of all pairs."""
    pairs = [(layer, neuron) for layer in range(2) for neuron in range(48)]
    numbers = draw_distinct(96, 28, generator_for(seed, "down_proj"))  # int(0.3 · 96)
    expected: dict[int, list[int]] = {}
    for number in numbers.tolist():
        layer, neuron = pairs[number]
        expected.setdefault(layer, []).append(neuron)
    assert chosen(attach(down_ratio=0.3, seed=seed), "down_proj") == expected


def test_the_share_is_of_the_model_not_of_a_layer() -> None:
    draws = [chosen(attach(down_ratio=0.3, seed=seed), "down_proj") for seed in range(9)]
    sizes = [[len(neurons) for neurons in draw.values()] for draw in draws]
    assert [sum(size) for size in sizes] == [28] * 9
    assert len({size[0] for size in sizes}) > 1


def test_heads_are_drawn_whole() -> None:
    features = chosen(attach(down_ratio=0.0, o_ratio=0.5), "o_proj")  # 4 of 8 heads
    heads = [(layer, feature // HEAD) for layer, channels in features.items() for feature in channels]
    assert sorted(heads) == sorted(list(set(heads)) * HEAD)
    assert len(set(heads)) == 4


def test_a_layer_without_a_drawn_channel_stays_as_it_is() -> None:
    model = attach(down_ratio=1.5 / 96)  # one neuron
    assert len(adapted(model)) == 1
    assert model.get_nb_trainable_parameters()[0] == 32


def test_the_draw_depends_on_the_seed_and_the_shapes_alone() -> None:
    torch.manual_seed(5)
    first = chosen(attach(down_ratio=0.3), "down_proj")
    torch.manual_seed(6)
    assert chosen(attach(down_ratio=0.3), "down_proj") == first
    assert chosen(attach(down_ratio=0.3, o_ratio=0.5), "down_proj") == first
    assert chosen(attach(down_ratio=0.3, seed=1), "down_proj") != first
    model = attach(down_ratio=0.3)
    model.add_adapter("again", S2ftConfig(down_ratio=0.3))  # on layers that already have an adapter
    for layer in adapted(model).values():
        inputs: Any = layer.diablo_inputs
        assert torch.equal(inputs["again"], inputs["default"])


# The count


def test_counts_without_weights() -> None:
    """LLaMA3-8B at d = 0.03: int(0.03 · 32 · 14336) = 13762 neurons of 4096 outputs. LLaMA2-7B's d and o below."""
    expected: dict[str, tuple[Any, int]] = {
        "llama3_8b": ({"down_ratio": 0.03}, 13_762 * 4096),
        "llama2_7b": ({"down_ratio": 0.02, "o_ratio": 0.052}, int(0.02 * 32 * 11008) * 4096 + 53 * 128 * 4096),
    }
    for name, (fields, count) in expected.items():
        base = empty_base(plan([f"model={name}"])[0].model.architecture)
        model = get_peft_model(base, S2ftConfig(task_type="CAUSAL_LM", **fields), low_cpu_mem_usage=True)
        assert model.get_nb_trainable_parameters()[0] == count


def test_the_tiny_model_trains_as_much_as_with_diablo() -> None:
    """0.375 · 4 layers · 192 neurons = 288 neurons, each with 96 outputs."""
    from experiments.plan.counting import count

    trained = [count(run).trainable for run in plan(["method=s2ft,diablo"])]
    assert trained == [288 * 96, 27_648]


# The layer


ALL_FOUR = {"down_ratio": 0.25, "o_ratio": 0.5, "up_ratio": 0.25, "v_ratio": 0.5}


def test_only_the_chosen_channels_are_trained() -> None:
    model = attach(**ALL_FOUR)
    train(model)
    trained = {name: layer for name, layer in adapted(model).items() if layer.get_delta_weight("default").any()}
    assert trained.keys() == adapted(model).keys()
    for projection in ("down_proj", "o_proj", "up_proj", "v_proj"):
        features = chosen(model, projection)
        assert features
        for name, layer in trained.items():
            if name.endswith(projection):
                dim = 0 if projection in ("down_proj", "o_proj") else 1
                assert changed_channels(layer, dim) == features[int(name.split(".")[4])]


def test_training_computes_what_the_permuted_model_does() -> None:
    """As in the released code: neurons are reordered, chosen ones first, and their part of down_proj is trained."""
    model = attach(down_ratio=0.3).double()
    permuted = tiny_llama().double()
    permuted.requires_grad_(False)
    slabs: list[tuple[Any, int]] = []
    for index, neurons in chosen(model, "down_proj").items():
        order = neurons + [neuron for neuron in range(48) if neuron not in neurons]
        mlp: Any = permuted.model.layers[index].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.data = projection.weight.data[order]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
        mlp.down_proj.weight.requires_grad_(True)
        slabs.append((mlp.down_proj.weight, len(neurons)))
    torch.testing.assert_close(permuted(tokens()).logits, model(tokens()).logits)

    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        sgd.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        sgd.step()
        permuted(input_ids=tokens(), labels=tokens()).loss.backward()
        with torch.no_grad():
            for weight, size in slabs:
                weight[:, :size] -= 0.1 * weight.grad[:, :size]
                weight.grad = None
    after: Tensor = model(tokens()).logits
    torch.testing.assert_close(permuted(tokens()).logits, after)
    assert not torch.allclose(after, tiny_llama().double()(tokens()).logits)


def test_saved_and_loaded_on_a_fresh_base_computes_the_same(tmp_path: Path) -> None:
    model = attach(**ALL_FOUR)
    train(model)
    logits = model(tokens()).logits
    model.save_pretrained(str(tmp_path))
    loaded: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(loaded(tokens()).logits, logits)
    assert torch.equal(loaded.merge_and_unload()(tokens()).logits, logits)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down_ratio": 1.5}, r"the share of down_proj is 1\.5: must be from 0 to 1"),
        ({"o_ratio": -0.1}, r"the share of o_proj is -0\.1"),
        ({"down_ratio": 0.0}, "nothing is trained: one of down_ratio"),
        ({"target_modules": ["q_proj"]}, r"target_modules={'q_proj'} must be unset: the ratios give \['down_proj'\]"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2ftConfig(**fields)


def test_a_share_that_is_no_channel_is_refused() -> None:
    message = r"down_proj: the share 0\.01 of 96 neurons of down_proj rounds to zero: raise it"
    with pytest.raises(ValueError, match=message):
        attach(down_ratio=0.01)
    with pytest.raises(ValueError, match=r"the share 0\.2 of 4 heads of v_proj rounds to zero"):
        attach(down_ratio=0.0, v_ratio=0.2)
