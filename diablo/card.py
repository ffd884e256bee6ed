"""The model card (README.md) of a saved adapter: says what it is and how to load it.

PEFT leaves an empty template. What a reader needs first is `import diablo`: `adapter_config.json` cannot run code, so
without the import PEFT only raises `KeyError: 'DIABLO'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftConfig

PAPER = "[arXiv 2506.03230](https://arxiv.org/abs/2506.03230)"
UNFILLED = "[More Information Needed]"  # in PEFT's template
IMPORT = "import diablo"
OURS = "<!-- Written by diablo with the adapter; without this line, saving again keeps what you write here. -->"


class WithCard:
    """Mixin before a PEFT config: saving it, the last thing a model's `save_pretrained` does, also writes the card."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        peft: Any = super()
        peft.save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), cast(PeftConfig, self))


def write_card(folder: Path, config: PeftConfig) -> None:
    """Write the card of an adapter over PEFT's template or our own; another author's only gets what it lacks."""
    path = folder / REPOCARD_NAME
    card = ModelCard.load(path) if path.is_file() else None
    if card is None or UNFILLED in card.text or OURS in card.text:
        data = card.data.to_dict() if card else {}
        text = f"{OURS}\n{_about(config)}\n{loading(config)}"
    else:
        data, text = card.data.to_dict(), card.text.strip()
        if IMPORT not in text:
            text = f"{text}\n\n{loading(config)}"
    save_card(path, config.base_model_name_or_path, {*data.pop("tags", []), str(config.peft_type).lower()}, data, text)


def save_card(path: Path, base: str | None, tags: set[str], data: dict[str, Any], text: str) -> None:
    """Write a card; `data` are the other fields of its front matter."""
    data = {**data, "library_name": "peft", "tags": sorted({*filter(_is_public, tags), "diablo"})}
    # As PEFT writes it, a folder or empty where the model has no name: PEFT's own tests ask for that.
    data["base_model"] = base or data.get("base_model")
    fields = {name: value for name, value in data.items() if value or (name == "base_model" and value is not None)}
    ModelCard(f"---\n{ModelCardData(**fields).to_yaml()}\n---\n\n{text}").save(path)


def loading(config: PeftConfig) -> str:
    """Return the section that says how to load the adapter."""
    base = hub_id(config.base_model_name_or_path)
    load = (
        "model = AutoPeftModelForCausalLM.from_pretrained(ADAPTER)"
        if config.task_type == "CAUSAL_LM" and base
        else "model = PeftModel.from_pretrained(base_model, ADAPTER)  # base_model: the model it was trained on"
    )
    kind = load.split(" = ")[1].split(".")[0]
    return f"""## How to load it

`pip install .` in a clone of the DiaBlo repository gives the package `diablo`. With ADAPTER the name of this folder or
repository:

```python
{IMPORT}  # registers the adapter's type with PEFT, which otherwise raises KeyError: '{config.peft_type}'
from peft import {kind}

{load}
```

`model.merge_and_unload()` returns a model without adapter. For servers that load LoRA only:
`python -m diablo.to_lora ADAPTER OUT`.
"""


def _about(config: PeftConfig) -> str:
    base = hub_id(config.base_model_name_or_path) or "a base model"
    shown = ("num_blocks", "pattern", "density", "count", "r", "target_modules", "layers_to_transform")
    settings = {name: getattr(config, name, None) for name in shown}
    listed = ", ".join(
        f"{name}={sorted(value) if isinstance(value, set) else value}"
        for name, value in settings.items()
        if value is not None
    )
    return f"""# Adapter of {base}

A PEFT adapter of type {config.peft_type}, trained with DiaBlo ({PAPER}): {listed}.
"""


def hub_id(base: str | None) -> str | None:
    """Return the base model's id on the hub; None for a folder or a file, whose path says nothing to others."""
    if not base or base.count("/") > 1 or base.startswith((".", "/", "~")) or base.endswith(".gguf"):
        return None
    return None if Path(base).exists() else base


def _is_public(tag: str) -> bool:
    """Return whether a tag is not PEFT's `base_model:adapter:` of a model without a name or in a local folder."""
    base = tag.removeprefix("base_model:adapter:")
    return base == tag or hub_id(base) is not None
