"""Conversion of the authors' checkpoints to our adapters and back, and the choice of N."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from diablo import suggest_num_blocks
from diablo.authors import from_authors, to_authors
from diablo.convert import main
from experiments.models.shapes import empty_base
from experiments.plan.compose import plan
from tests.diablo.blocks.test_diablo_tuner import adapted, tiny_llama, tokens

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def their_state(num_blocks: int, layers: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    """Return a state dict as ziyangjoy/DiaBlo's trainer writes it, in bf16; block sides and count are rounded up."""
    state = {}
    for name, module in tiny_llama().named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS) and int(name.split(".")[2]) in layers:
            d_in, d_out = -(-module.in_features // num_blocks), -(-module.out_features // num_blocks)
            n = max(-(-module.in_features // d_in), -(-module.out_features // d_out))
            state[f"{name}.block_A"] = torch.randn(n, d_in, d_out).bfloat16() / 4
    return state


def their_model(state: dict[str, Tensor]) -> LlamaForCausalLM:
    """Return the model with merged weights: W plus the padded block diagonal, cut to the layer and transposed."""
    model = tiny_llama()
    for key, blocks in state.items():
        layer: Any = model.get_submodule(key.removesuffix(".block_A"))
        dense = torch.block_diag(*blocks.float())[: layer.in_features, : layer.out_features]
        layer.weight.data += dense.T
    return model


@pytest.mark.parametrize("num_blocks", [4, 5])
def test_a_converted_checkpoint_computes_what_theirs_does_and_converts_back(
    num_blocks: int, base: Path, tmp_path: Path
) -> None:
    state = their_state(num_blocks)
    torch.save(state, tmp_path / "adapter.chkpt")
    config = from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))
    assert config.allow_uneven == (num_blocks == 5)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    assert len(adapted(loaded)) == 10
    torch.testing.assert_close(loaded(tokens()).logits, their_model(state)(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert to_authors(tmp_path / "ours", tmp_path / "back.chkpt") == 10
    back = torch.load(tmp_path / "back.chkpt", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key].float()) for key in state)


def test_a_checkpoint_of_some_layers_adapts_those(base: Path, tmp_path: Path) -> None:
    torch.save({f"module.{key}": value for key, value in their_state(4, layers=(1,)).items()}, tmp_path / "a.chkpt")
    from_authors(tmp_path / "a.chkpt", tmp_path / "ours", str(base))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    assert {name.split("layers.")[1][0] for name in adapted(loaded)} == {"1"}


def test_a_layer_outside_the_decoder_is_converted_too(base: Path, tmp_path: Path) -> None:
    torch.save({"lm_head.block_A": torch.ones(4, 8, 16)}, tmp_path / "a.chkpt")
    assert from_authors(tmp_path / "a.chkpt", tmp_path / "ours", str(base)).num_blocks == 4


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Code(), "not a file of tensors only, which is all that is read"),
        ([1], "holds a list, not a state dict"),
        ({"score.weight": torch.ones(2)}, r"score.weight is no \.block_A tensor"),
        (
            {"model.layers.7.mlp.up_proj.block_A": torch.ones(4, 8, 12)},
            r"has no linear layer model\.layers\.7\.mlp\.up_",
        ),
        (
            {"model.layers.0.mlp.up_proj.block_A": torch.ones(4, 8, 11)},
            r"shape \(4, 8, 11\), which no N gives for a layer 32 → 48: give the base",
        ),
        (
            {
                "model.layers.0.self_attn.q_proj.block_A": torch.ones(4, 8, 8),
                "model.layers.0.self_attn.k_proj.block_A": 1,
            },
            r"k_proj.block_A is no \.block_A tensor",
        ),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(
    content: object, message: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "adapter.chkpt")
    with pytest.raises(ValueError, match=message):
        from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))
    assert "never be printed" not in capfd.readouterr().out
    assert not (tmp_path / "ours").exists()


Q_PROJ = "model.layers.0.self_attn.q_proj.block_A"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (torch.ones(4, 8, 8).to_sparse(), r"q_proj\.block_A is a tensor of torch.float32 and torch.sparse_coo: blocks"),
        (torch.ones(4, 8, 8, device="meta"), r"q_proj\.block_A is a tensor without values"),
        (torch.ones(4, 8, 8, dtype=torch.complex64), r"q_proj\.block_A is a tensor of torch.complex64"),
        (torch.ones(4, 8, 8, dtype=torch.int32), r"q_proj\.block_A is a tensor of torch.int32"),
        (torch.full((4, 8, 8), torch.nan), r"q_proj\.block_A has values that are NaN or infinite"),
        (torch.full((4, 8, 8), 1e300, dtype=torch.float64), r"q_proj\.block_A has values that are NaN or infinite"),
        (torch.ones(0, 8, 8), r"shape \(0, 8, 8\), which no N gives"),
        (torch.ones(1).expand(4, 2**40, 8), r"which no N gives"),
    ],
)
def test_blocks_that_are_no_dense_finite_numbers_are_refused(
    blocks: Tensor, message: str, base: Path, tmp_path: Path
) -> None:
    torch.save({Q_PROJ: blocks}, tmp_path / "adapter.chkpt")
    with pytest.raises(ValueError, match=message):
        from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))
    assert not (tmp_path / "ours").exists()


def test_a_layer_that_is_there_twice_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save({Q_PROJ: torch.ones(4, 8, 8), f"module.{Q_PROJ}": torch.ones(4, 8, 8)}, tmp_path / "adapter.chkpt")
    with pytest.raises(ValueError, match="q_proj has blocks twice"):
        from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80\x02]q\x00.", b"PK\x03\x04", b"hello", b"\x80\x04\x95\xff", bytes(range(256))]
)
def test_any_bytes_give_one_line(content: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.chkpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^.*adapter\.chkpt: (not a file of tensors only|holds a)[^\n]*$"):
        from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))


@pytest.mark.parametrize("value", [print, torch.nn.Linear(2, 2), Path()])
def test_nobody_is_advised_to_run_code_from_a_file(value: object, base: Path, tmp_path: Path) -> None:
    for write in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))):
        write({"layer.block_A": value}, tmp_path / "adapter.chkpt")
        with warnings.catch_warnings(record=True) as told, pytest.raises(ValueError, match="it holds") as caught:
            from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))
        assert not told
        assert "weights_only" not in str(caught.value)
        assert "trust" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", "new", "--base", "BASE"], "nosuch: does not exist: give the authors' adapter.chkpt"),
        (["base", "new", "--base", "BASE"], "base: a folder: give the authors' adapter.chkpt"),
        (["adapter.chkpt", "base", "--base", "BASE"], "base already exists: name a new one, or delete it first"),
        (
            ["adapter.chkpt", "new", "--base", "nosuch"],
            "base model nosuch: neither a folder with a config.json nor a hub",
        ),
        (["adapter.chkpt", "adapter.chkpt/new", "--base", "BASE"], "adapter.chkpt/new: Not a directory"),
        (["nosuch", "new", "--back"], "nosuch: does not exist: give the folder of an adapter"),
        (["adapter.chkpt", "new", "--back"], "adapter.chkpt: a file: give the folder of an adapter"),
        (["base", "new", "--back"], "base: has no adapter_config.json: give the folder of an adapter"),
        (["base", "adapter.chkpt", "--back"], "adapter.chkpt already exists"),
    ],
)
def test_wrong_files_and_folders_are_one_line(
    arguments: list[str],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(their_state(4), "adapter.chkpt")
    given = [str(base) if argument == "BASE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["convert", *given])
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_an_adapter_that_was_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save(their_state(4), tmp_path / "adapter.chkpt")
    from_authors(tmp_path / "adapter.chkpt", tmp_path / "ours", str(base))
    file = tmp_path / "ours" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"ours: adapter_model\.safetensors is not a complete safetensors file"):
        to_authors(tmp_path / "ours", tmp_path / "back.chkpt")


def test_the_command_prints_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(their_state(4), tmp_path / "adapter.chkpt")
    command = ["diablo.convert", str(tmp_path / "adapter.chkpt"), str(tmp_path / "ours"), "--base", str(base)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    told = capsys.readouterr().out
    assert told.endswith("num_blocks=4, target_modules=['down_proj', 'k_proj', 'q_proj', 'up_proj', 'v_proj']\n")
    torch.save({}, tmp_path / "adapter.chkpt")
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


# Choosing N


def architecture(name: str) -> Any:
    (config,) = plan([f"model={name}", "method=base"])
    return empty_base(config.model.architecture)


def share(model: Any, chosen: dict[str, int]) -> float:
    layers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in chosen]
    names = [n.rpartition(".")[2] for n, m in model.named_modules() if n.rpartition(".")[2] in chosen]
    trained = sum(m.in_features * m.out_features // chosen[n] for m, n in zip(layers, names, strict=True))
    return trained / sum(p.numel() for p in model.parameters())


def test_a_budget_that_fits_gives_one_n_with_sides_in_multiples_of_16() -> None:
    model = architecture("llama3_8b")
    assert suggest_num_blocks(model, budget=0.01) == dict.fromkeys(TARGETS, 64)
    assert 0.005 < share(model, dict.fromkeys(TARGETS, 64)) <= 0.01


def test_a_shape_that_has_no_such_sides_gets_the_largest_it_has_and_a_warning() -> None:
    model = architecture("llama2_7b")  # 11008 = 2⁸ · 43
    with pytest.warns(UserWarning, match="block sides are multiples of 2, not of 16"):
        chosen = suggest_num_blocks(model)
    assert chosen == {"q_proj": 256, "k_proj": 256, "v_proj": 256, "up_proj": 128, "down_proj": 128}
    assert 0.004 < share(model, chosen) <= 0.005
    assert suggest_num_blocks(model, budget=0.05, target_modules=["q_proj"]) == {"q_proj": 2}


def test_a_budget_below_the_finest_split_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"budget=1e-06 is 0 of [\d,]+ parameters; .* trains [\d,]+ \("):
        suggest_num_blocks(tiny_llama(), budget=1e-6)
    with pytest.raises(ValueError, match="nothing matches no module of LlamaForCausalLM"):
        suggest_num_blocks(tiny_llama(), target_modules=["q_proj", "nothing"])
    with pytest.raises(ValueError, match=r"target_modules=\['norm'\] matches no linear layer"):
        suggest_num_blocks(tiny_llama(), target_modules=["norm"])


def test_all_linear_means_what_peft_means_by_it() -> None:
    model = LlamaForSequenceClassification(tiny_llama().config)  # its classifier, 32 → 2, is left out
    assert set(suggest_num_blocks(model, budget=0.9, multiple_of=8, target_modules="all-linear")) == {
        *TARGETS, "o_proj", "gate_proj",
    }  # fmt: skip


def test_layers_of_one_name_and_two_shapes_are_told_apart() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"p": nn.Linear(64, 64)}), "b": nn.ModuleDict({"p": nn.Linear(64, 32)})})
    assert suggest_num_blocks(model, budget=0.6, target_modules=["p"]) == {"a.p": 2, "b.p": 2}
