"""Prints what each method of configs/method can do, from its `contract` and its config class.

    python -m experiments.methods
    python -m experiments.methods --markdown     # the table of docs/capabilities.md

The contract tests (tests/experiments/train/test_methods.py and test_sharding.py) hold every cell.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from experiments import CONFIGS
from experiments.errors import run_command
from experiments.settings import section

# Column -> the field of the contract (experiments/plan/config_groups.py).
CONTRACT: Mapping[str, str] = {
    "Starts at base": "starts_at_base",
    "Merges": "merges",
    "Changes base": "changes_base_at_start",
    "Checkpointing": "gradient_checkpointing",
    "Quantised base": "on_quantized",
    "DDP": "ddp",
    "FSDP2": "fsdp2",
    "Compile": "compile",
}
MEANINGS: Mapping[str, str] = {
    "Starts at base": "attaching changes no output, to rounding",
    "Merges": "what is trained can be merged into the base's weights; such runs are scored merged",
    "Changes base": "attaching changes the base's weights (a decomposition is subtracted from them)",
    "Checkpointing": "gradients under gradient checkpointing are the same, bit for bit",
    "Quantised base": "trains on a packed base, whose codes stay as they are",
    "DDP": "two processes train like one",
    "FSDP2": "two processes that each hold a part of the model train like one; not on a quantised base",
    "Compile": "gradients of the compiled model are the same; tested on the CPU with `aot_eager`",
    "In place": "can be trained inside the weight, with one matrix product per layer, at dropout 0",
    "Dropout": "can drop the input of what is trained",
    "Needs rows": "looks at training rows before it is attached",
    "Needs run": "continues from a run of this method",
}
NOT_TRAINED = ("Checkpointing", "Quantised base", "DDP", "FSDP2", "Compile")  # no cell for the untrained base


def contract_of(name: str) -> dict[str, bool]:
    """Return the `contract` of a method's file, with that of the files it builds on."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
    inherited: dict[str, bool] = {}
    for other in content.get("defaults", []):
        if other != "_self_":
            inherited |= contract_of(other)
    return {**inherited, **content.get("contract", {})}


def row_of(name: str) -> dict[str, str]:
    """Return a method's cells by column."""
    from diablo.blocks.config import BlockConfig
    from experiments.plan.compose import plan
    from experiments.plan.config_groups import Contract
    from experiments.train.methods import peft_config

    (config,) = plan([f"method={name}", "recipe.learning_rate=1e-3"])
    method, contract = config.method, section(Contract, contract_of(name), "method.contract")
    cells = {column: _word(getattr(contract, field)) for column, field in CONTRACT.items()}
    if method.trains == "nothing":
        cells |= dict.fromkeys(NOT_TRAINED, "")
    adapter = None if method.adapter is None else peft_config(method.adapter)
    fields: set[str] = set() if adapter is None else {field.name for field in dataclasses.fields(adapter)}
    return {
        "Method": name,
        **cells,
        "In place": _word(isinstance(adapter, BlockConfig)) if method.trains != "nothing" else "",
        "Dropout": _word(bool(fields & {"dropout", "lora_dropout"})) if method.trains != "nothing" else "",
        "Needs rows": _word(method.prepare is not None and method.prerequisite is None),
        "Needs run": "" if method.prerequisite is None else method.prerequisite.method.name,
    }


def _word(value: bool) -> str:
    return "yes" if value else "no"


def table() -> list[dict[str, str]]:
    from experiments.plan.compose import options

    return [row_of(name) for name in options("method")]


def as_markdown(rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join([f"`{row['Method']}`", *list(row.values())[1:]]) + " |" for row in rows]
    meanings = [f"* **{column}**: {text}." for column, text in MEANINGS.items()]
    return "\n".join([*lines, "", *meanings])


def as_text(rows: list[dict[str, str]]) -> str:
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    lines = [dict(zip(columns, columns, strict=True)), *rows]
    return "\n".join(
        "  ".join(line[column].ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="as Markdown, with the meaning of the columns")
    options = parser.parse_args(arguments)
    print((as_markdown if options.markdown else as_text)(table()))


if __name__ == "__main__":
    run_command(main)
