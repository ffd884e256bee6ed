"""Conversion of adapters of blocks to LoRA, compared with the dense update; and commands that answer --help at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig, S2ftConfig, SmtConfig, SparseConfig
from diablo.blocks.layer import DiabloLayer
from diablo.low_rank import factors, parts, to_lora
from diablo.to_lora import main
from experiments import ROOT
from tests.diablo.blocks.test_diablo_tuner import tiny_llama, tokens

SIDES = (48, 32)  # inputs, outputs


def dense(adapter: Path, base: nn.Module) -> dict[str, Tensor]:
    """Return the update of each layer, `(out, in)` in float64."""
    model = PeftModel.from_pretrained(base, adapter)  # pyright: ignore[reportArgumentType]
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, DiabloLayer)}
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}


def products(lora: Path) -> dict[str, Tensor]:
    tensors = load_file(lora / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    factors_of = {name: [tensors[f"{name}.lora_{letter}.weight"].double() for letter in "BA"] for name in names}
    return {name.removeprefix("base_model.model."): b @ a for name, (b, a) in factors_of.items()}


def save(folder: Path, config: PeftConfig, **weights: Tensor) -> Path:
    """Save an adapter with random blocks; `weights` replaces those of layers whose name ends so."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "diablo_blocks" in name:
            value = next((value for key, value in weights.items() if f".{key}." in name), None)
            parameter.data = torch.randn_like(parameter) / 4 if value is None else value.clone()
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("num_blocks", [4, 5])
def test_full_rank_is_exact_and_less_drops_the_smallest_singular_values(num_blocks: int) -> None:
    d_in, d_out = -(-SIDES[0] // num_blocks), -(-SIDES[1] // num_blocks)
    blocks = torch.randn(num_blocks, d_in, d_out, dtype=torch.float64)
    blocks[0] *= 8  # so that the blocks do not all contribute equally many
    update = torch.block_diag(*blocks)[: SIDES[0], : SIDES[1]].T
    values = torch.linalg.svdvals(update)
    found = parts(blocks, None, *SIDES)
    whole = factors(found, *SIDES, None, torch.float64)
    assert len(whole.A) == (values > 1e-9).sum()
    torch.testing.assert_close(whole.B @ whole.A, update)
    assert whole.error < 1e-20
    for rank in (1, 3, 9):
        low = factors(found, *SIDES, rank, torch.float64)
        assert (low.A.shape, low.B.shape) == ((rank, SIDES[0]), (SIDES[1], rank))
        dropped = values[rank:].square().sum().item()
        assert low.error == pytest.approx(dropped, rel=1e-9)
        assert (update - low.B @ low.A).square().sum().item() == pytest.approx(dropped, rel=1e-9)
        assert low.norm == pytest.approx(update.square().sum().item())
        torch.testing.assert_close(low.A.norm(dim=1), values[:rank].sqrt())  # ordered, so more can be cut off


CONFIGS = {
    "diablo": DiabloConfig(num_blocks=4, task_type="CAUSAL_LM"),
    "per layer": DiabloConfig(num_blocks={"q_proj": 2, "up_proj": 4}, target_modules=["q_proj", "up_proj"]),
    "one layer": DiabloConfig(num_blocks=4, target_modules=["k_proj"], layers_to_transform=[1]),
    "uneven": DiabloConfig(num_blocks=5, allow_uneven=True, target_modules=["q_proj", "down_proj"]),
    "rows": SparseConfig(pattern="random_row", density="1/8", target_modules=["q_proj", "down_proj"]),
    "columns": SparseConfig(pattern="random_column", density="1/8", target_modules=["k_proj"]),
    "blocks": SparseConfig(pattern="random_block", density="1/4", target_modules=["q_proj", "up_proj"]),
    "shuffled": SparseConfig(pattern="shuffled_diagonal", density="1/4", target_modules=["q_proj"]),
    "entries": SparseConfig(pattern="random_entry", density="1/64", target_modules=["v_proj"]),
    "smt": SmtConfig(
        num_blocks=2,
        block_size=8,
        target_modules=["q_proj"],
        blocks={"model.layers.1.self_attn.q_proj": [[0, 1], [0, 2]]},
    ),
    "s2ft": S2ftConfig(down_ratio=0.1, v_ratio=0.5),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_an_exact_conversion_loads_in_peft_and_computes_the_same(case: str, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", CONFIGS[case])
    tiny_llama().save_pretrained(tmp_path / "base")
    done = to_lora(adapter, tmp_path / "lora", base=str(tmp_path / "base"))
    assert done.error < 1e-6
    updates, made = dense(adapter, tiny_llama()), products(tmp_path / "lora")
    assert made.keys() == updates.keys() == done.ranks.keys()
    for name, update in updates.items():
        torch.testing.assert_close(made[name], update, rtol=0, atol=1e-6)
        assert done.ranks[name] == torch.linalg.matrix_rank(update)
    config = PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert config.peft_type == "LORA"
    expected = PeftModel.from_pretrained(tiny_llama(), adapter)(tokens()).logits
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - tiny_llama()(tokens()).logits).abs().max() > 0.1


def test_a_rank_and_a_dtype_are_kept_to_and_their_error_is_stored(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", CONFIGS["diablo"], v_proj=torch.zeros(4, 8, 4))
    done = to_lora(adapter, tmp_path / "lora", rank=20, dtype=torch.bfloat16)
    assert set(done.ranks.values()) == {20, 16, 1}  # k_proj has 16 outputs, v_proj an update of zero
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    updates, made = dense(adapter, tiny_llama()), products(tmp_path / "lora")
    for name, update in updates.items():
        expected = ((update - made[name]).norm() / update.norm()).item() if "v_proj" not in name else 0
        assert done.errors[name] == pytest.approx(expected, rel=1e-6)
    missing = sum((update - made[name]).square().sum().item() for name, update in updates.items())
    norm = sum(update.square().sum().item() for update in updates.values())
    assert done.error == pytest.approx((missing / norm) ** 0.5, rel=1e-6)
    stored = json.loads((tmp_path / "lora" / "conversion.json").read_text(encoding="utf-8"))
    assert (stored["error"], stored["errors"], stored["ranks"]) == (done.error, done.errors, done.ranks)
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert f"{done.error:.2e} over all 10\nlayers" in card
    assert "import diablo" not in card


def test_modules_trained_in_full_are_kept(tmp_path: Path) -> None:
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save.default.weight += 1
    model.save_pretrained(str(tmp_path / "adapter"))
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=300
    )


@pytest.mark.slow
def test_the_command_converts_without_the_base_and_loads_without_diablo(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", CONFIGS["diablo"])
    tiny_llama().save_pretrained(tmp_path / "base")
    done = run("-m", "diablo.to_lora", str(adapter), str(tmp_path / "lora"), "--rank", "8")
    assert done.returncode == 0, done.stderr
    assert "lora: LoRA of rank 8, error " in done.stdout
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), sys.argv[1])
print(model.peft_config["default"].r, "diablo" in sys.modules)
"""
    loaded = run("-c", code, str(tmp_path / "lora"))
    assert loaded.stdout.split() == ["8", "False"], loaded.stderr
    assert "missing" not in loaded.stderr


DAMAGED = ("other", "unlisted", "flat", "unplaced", "weightless")


def damaged(folder: Path) -> None:
    """Save an adapter whose files do not belong together, in the way that the folder's name says."""
    kind = CONFIGS["rows"] if folder.name == "unplaced" else DiabloConfig(num_blocks=4, target_modules=["q_proj"])
    save(folder, kind)
    weights, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(about.read_text(encoding="utf-8"))
    if folder.name == "weightless":
        weights.unlink()
        return
    if folder.name in ("other", "unlisted"):
        config["num_blocks"] = 8 if folder.name == "other" else {"v_proj": 4}
    for key, tensor in tensors.items():
        if folder.name == "flat":
            tensors[key] = tensor.flatten(1)
        elif folder.name == "unplaced" and key.endswith("diablo_inputs"):
            tensors[key] = tensor[:, :1].clone() if tensor.shape[1] > 1 else tensor[:1].clone()
    about.write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, weights, metadata={"format": "pt"})


def test_the_command_prints_a_summary_and_with_layers_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save(tmp_path / "adapter", CONFIGS["diablo"])
    for number, options in enumerate([["--rank", "4"], ["--rank", "4", "--layers"], []]):
        out = tmp_path / f"lora{number}"
        monkeypatch.setattr(sys, "argv", ["to_lora", str(adapter), str(out), *options])
        main()
        lines = capsys.readouterr().out.splitlines()
        stored = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
        worst = max(stored["errors"], key=lambda name: stored["errors"][name])
        layers = 10 if "--layers" in options else 0
        assert len(lines) == layers + (4 if options else 3)
        assert lines[layers] == f"layers: 10, of rank {'4' if options else '16 to 32'}"
        assert lines[layers + 1].endswith(f"greatest {stored['errors'][worst]:.2e} ({worst})")
        assert (
            lines[layers + 2]
            == f"{out}: LoRA of rank {4 if options else 32}, error {stored['error']:.2e} over all layers"
        )
        if options:
            assert lines[-1].startswith("the LoRA lacks much of the adapter's update, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: does not exist: give the folder of an adapter, which has adapter_config.json"),
        (
            ["adapter", "--base", "nosuch"],
            "base model nosuch: neither a folder with a config.json nor a hub id whose con",
        ),
        (["adapter", "--base", "narrow"], " do not cover the layer "),
        (["other"], "blocks of shape (4, 8, 8): adapter_config.json says num_blocks=8: they are not of one adapter"),
        (["unlisted"], "adapter_config.json: model.layers.0.self_attn.q_proj: num_blocks has no entry for this layer"),
        (["flat"], "blocks of shape (4, 64) and torch.float32: they must be three-dimensional floating-point numbers"),
        (["unplaced"], "they do not belong together"),
        (["weightless"], "weightless: has no adapter_model.safetensors: give the folder of an adapter"),
        (["adapter", "--rank", "0"], "rank=0 must be at least 1"),
        (["lora"], "an adapter of type LORA without blocks"),
        (["rows"], "the blocks do not tell the sides of their layers: name the base model (--base)"),
        (["broken"], "model.layers.0.self_attn.q_proj has values that are NaN or infinite"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, *options = arguments
    if name == "broken":
        save(
            tmp_path / name,
            DiabloConfig(num_blocks=4, target_modules=["q_proj"]),
            q_proj=torch.full((4, 8, 8), torch.nan),
        )
    elif name in DAMAGED:
        damaged(tmp_path / name)
    elif name != "nowhere":
        adapter = save(tmp_path / "adapter", CONFIGS["rows" if name == "rows" else "diablo"])
        if name == "rows":
            adapter.rename(tmp_path / "rows")
        if name == "lora":
            to_lora(adapter, tmp_path / "lora")
    if "narrow" in options:
        config = tiny_llama().config
        config.hidden_size = config.hidden_size // config.num_attention_heads * 2
        config.num_attention_heads, config.num_key_value_heads = 2, 1
        config.save_pretrained(tmp_path / "narrow")
        options = ["--base", str(tmp_path / "narrow")]
    monkeypatch.setattr(sys, "argv", ["to_lora", str(tmp_path / name), str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["diablo.convert", "diablo.to_lora"])
def test_help_does_not_wait_for_torch(module: str) -> None:
    done = run("-X", "importtime", "-m", module, "--help")
    assert f"usage: python -m {module}" in done.stdout
    assert " argparse" in done.stderr
    assert "torch" not in done.stderr


@pytest.mark.real
def test_smollm2_computes_the_same_with_the_converted_adapter(smollm2: Path, tmp_path: Path) -> None:
    """Exact in logits; the error of rank 64 is the dropped singular values of each layer's dense update."""

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    config = DiabloConfig(num_blocks=32, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "diablo_blocks" in name:
            parameter.data = torch.randn_like(parameter) * 0.02
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.arange(1000, 1040)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base(), tmp_path / "adapter")(ids).logits
        done = to_lora(tmp_path / "adapter", tmp_path / "lora")
        assert set(done.ranks.values()) == {576, 192}
        got = PeftModel.from_pretrained(base(), tmp_path / "lora")(ids).logits
        assert (expected - base()(ids).logits).abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    low = to_lora(tmp_path / "adapter", tmp_path / "low", rank=64)
    name, update = next(iter(dense(tmp_path / "adapter", base()).items()))
    values = torch.linalg.svdvals(update)
    assert low.errors[name] == pytest.approx((values[64:].norm() / values.norm()).item(), rel=1e-4)
