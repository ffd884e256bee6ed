"""The model card that saving an adapter writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from diablo import BottleneckConfig, DiabloConfig, MiloraConfig, SparseConfig
from diablo.card import UNFILLED, hub_id
from experiments import ROOT
from tests.diablo.blocks.test_diablo_tuner import tiny_llama, tokens

CONFIGS = [
    DiabloConfig(num_blocks=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"),
    SparseConfig(density="1/8", target_modules=["q_proj"]),
    BottleneckConfig(target_modules=["down_proj"], bottleneck_size=4),
    MiloraConfig(r=2, target_modules=["q_proj"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.peft_type))
def test_saving_leaves_a_card_that_says_how_to_load(config: PeftConfig, tmp_path: Path) -> None:
    base = tiny_llama()
    base.name_or_path = "someone/small-llama"
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert "import diablo" in card.text
    assert f"KeyError: '{config.peft_type}'" in card.text
    assert UNFILLED not in card.text
    data = card.data.to_dict()
    assert (data["base_model"], data["library_name"]) == ("someone/small-llama", "peft")
    assert {"diablo", str(config.peft_type).lower()} <= set(data["tags"])


def test_the_card_is_rewritten_with_the_adapter_and_a_users_card_is_kept(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for num_blocks in (2, 4):
        config = DiabloConfig(num_blocks=num_blocks, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path))
    assert "num_blocks=4" in card.read_text(encoding="utf-8")
    assert "num_blocks=2" not in card.read_text(encoding="utf-8")
    card.write_text("---\nlicense: mit\n---\n\n# Mine: größer\n", encoding="utf-8")
    for _ in range(2):
        get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path))
    text = card.read_text(encoding="utf-8")
    assert "# Mine: größer" in text
    assert text.count("import diablo") == 1
    assert ModelCard(text).data.to_dict()["license"] == "mit"


def test_a_hub_id_has_at_most_one_slash_and_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt3").mkdir()
    ids = [name for name in ("gpt2", "org/some", "org/some-GGUF") if hub_id(name) == name]
    assert ids == ["gpt2", "org/some", "org/some-GGUF"]
    paths = [None, "", "gpt3", "./gpt2", "/models/gpt2", "~/gpt2", "a/b/c", "model.gguf", str(tmp_path)]
    assert [hub_id(path) for path in paths] == [None] * len(paths)


def test_a_path_of_this_machine_is_not_in_the_text(tmp_path: Path) -> None:
    """In the front matter PEFT writes it, as in adapter_config.json, and PEFT's tests ask for it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "adapter")
    )
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert str(tmp_path) not in card.text
    assert card.data.to_dict()["base_model"] == str(tmp_path / "base")


def test_what_the_card_says_is_so(tmp_path: Path) -> None:
    """Without the import PEFT raises the KeyError that the card names; the card's own code loads the adapter."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.model.model.layers[0].self_attn.q_proj.diablo_blocks["default"].data += 1  # pyright: ignore
    model.save_pretrained(str(tmp_path / "adapter"))
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = {"ADAPTER": str(tmp_path / "adapter"), "base_model": type(base).from_pretrained(tmp_path / "base")}
    exec(code, names)
    loaded = names["model"]
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)
    without = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", without, str(tmp_path / "adapter")],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "KeyError: 'DIABLO'"


def test_peft_own_methods_keep_pefts_card(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    assert "diablo" not in (tmp_path / "README.md").read_text(encoding="utf-8")
