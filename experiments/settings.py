"""What the settings of a run may be: types, ranges and words. Standard library only.

A setting that `SETTINGS` does not name is of the type of its value in the config files: a flag, a whole number, a
number (neither of them negative), text, or a list of these. Numbers that are equal are stored alike, so that they give
one run id: as the config files write the number if they do, else 8.0 as 8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.errors import UserError

Config = dict[str, Any]
SECTIONS = ("model", "method", "quantization", "task", "recipe", "spectra", "protocol", "evaluation", "runtime")
NAME = re.compile(r"\w[\w.+=,@-]{0,99}")  # names become folders: no path fits
BENCHMARK = re.compile(rf"{NAME.pattern}|(?:[^\0]*/)?{NAME.pattern}\.txt")
SHARE = re.compile(r"1/[1-9]\d*")
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
PATTERNS = (
    *("diagonal", "random_block", "permuted_block", "shuffled_diagonal"),
    *("random_row", "random_column", "random_entry", "banded"),
)
OPTIMIZERS = (  # transformers' names
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit"),
    *("adamw_torch_8bit", "adamw_anyprecision", "adamw_bnb_8bit", "adamw_8bit", "adafactor", "adagrad", "sgd"),
    *("ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit"),
    *("rmsprop_bnb_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo"),
    *("grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw"),
    *("apollo_adamw_layerwise", "stable_adamw"),
)
TYPES = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "text (in quotes if it looks like a number)",
    "name": "a name of letters, digits and _.+=,@-, at most 100 of them",
    "benchmark": "a benchmark's name or the path of a .txt file whose own name has letters, digits and _.+=,@- alone",
    "share": "a share as 1/64 or 0.015625",
    "map": "a map as {key: value}",
}


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
        kind: a key of `TYPES`.
        least, most: the range of a number; without the first where `above` is set, without the last where `below` is.
        words: what it may be instead, or must be if the kind is "word".
        null: null is allowed too.
        many: "list" for a list of such values, "or list" for one or a list.
        length: of that list.
        mapped: a map from names to such values is allowed too.
    """

    kind: str
    least: float = -math.inf
    most: float = math.inf
    words: tuple[str, ...] = ()
    null: bool = False
    many: str = ""
    length: int | None = None
    mapped: bool = False
    above: bool = False
    below: bool = False

    def stored(self, value: Any) -> Any:
        """The value as it is stored; ValueError if it is not allowed."""
        if value is None and self.null:
            return None
        if self.mapped and isinstance(value, dict):
            return {key: self.stored(part) for key, part in value.items()}
        if self.many and isinstance(value, list):
            if self.length not in (None, len(value)):
                raise ValueError
            return [self._one(part) for part in value]
        if self.many == "list":
            raise ValueError
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind in ("whole", "number") or (self.kind == "share" and not isinstance(value, str)):
            return self._number(value)
        fits = {
            "flag": lambda: isinstance(value, bool),
            "text": lambda: isinstance(value, str),
            "name": lambda: isinstance(value, str) and NAME.fullmatch(value),
            "benchmark": lambda: isinstance(value, str) and BENCHMARK.fullmatch(value),
            "share": lambda: SHARE.fullmatch(value),
            "map": lambda: isinstance(value, dict),
            "word": lambda: False,
        }
        if not fits[self.kind]():
            raise ValueError
        return value

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if value < self.least or value > self.most:
            raise ValueError
        if (self.above and value == self.least) or (self.below and value == self.most):
            raise ValueError
        whole = value == int(value)
        if self.kind == "whole" and not whole:
            raise ValueError
        return int(value) if whole else value

    def __str__(self) -> str:
        words = ", ".join(self.words)
        text = f"one of {words}" if self.kind == "word" else TYPES[self.kind]
        if self.least > -math.inf:
            text += f" {'above' if self.above else 'of at least'} {self.least:g}"
        if self.most < math.inf:
            text += f"{' and' if self.least > -math.inf else ''} {'below' if self.below else 'at most'} {self.most:g}"
        if self.kind != "word" and words:
            text += f", or {words}"
        if self.many:
            count = "" if self.length is None else f"{self.length} values, each "
            text = f"a list of {count}{text}" if self.many == "list" else f"{text}, or a list of such"
        return text + (", or null" if self.null else "")


FLAG, TEXT, NAMED, MAP = Rule("flag"), Rule("text"), Rule("name"), Rule("map")
COUNT = Rule("whole", 1)
AMOUNT = Rule("number", 0)
DROPOUT = Rule("number", 0, 1, below=True)
MAYBE_COUNT, MAYBE_TEXT, MAYBE_MAP = (replace(rule, null=True) for rule in (COUNT, TEXT, MAP))
PER_KIND = replace(COUNT, mapped=True)


def _words(*words: str, null: bool = False) -> Rule:
    return Rule("word", words=words, null=null)


SETTINGS = {
    "run_id": NAMED,
    "seed": Rule("whole", 0, 2**32 - 1),
    "recipe.learning_rate": AMOUNT,
    "recipe.epochs": Rule("number", 0, above=True),
    "recipe.max_steps": MAYBE_COUNT,
    "recipe.batch_size": COUNT,
    "recipe.micro_batch_size": COUNT,
    "recipe.optimizer": _words(*OPTIMIZERS),
    "recipe.betas": Rule("number", 0, 1, below=True, many="list", length=2),
    "recipe.schedule": _words("linear", "cosine", "constant"),
    "recipe.warmup_steps": Rule("number", 0),
    "recipe.adapter_dropout": DROPOUT,
    "spectra.every": MAYBE_COUNT,
    "spectra.blocks": COUNT,
    "spectra.tokens": COUNT,
    "protocol.name": NAMED,
    "protocol.version": COUNT,
    "protocol.prompt": MAYBE_TEXT,
    "protocol.prompt_with_input": MAYBE_TEXT,
    "protocol.replace": Rule("map"),
    "protocol.max_prompt_length": MAYBE_COUNT,
    "protocol.max_target_length": MAYBE_COUNT,
    "protocol.max_length": COUNT,
    "protocol.repeated_prompts": _words("all", "last"),
    "evaluation.protocol": NAMED,
    "evaluation.version": COUNT,
    "evaluation.prompt": MAYBE_TEXT,
    "evaluation.prompt_with_input": MAYBE_TEXT,
    "evaluation.generation.num_beams": PER_KIND,
    "evaluation.generation.max_new_tokens": PER_KIND,
    "evaluation.generation.stop": replace(TEXT, many="list", mapped=True),
    "evaluation.generation.samples": PER_KIND,
    "evaluation.generation.temperature": replace(AMOUNT, null=True, mapped=True),
    "evaluation.generation.top_p": Rule("number", 0, 1, above=True, null=True, mapped=True),
    "evaluation.generation.top_k": Rule("whole", 0, null=True, mapped=True),
    "evaluation.generation.max_length": replace(PER_KIND, null=True),
    "evaluation.searched": replace(NAMED, mapped=True),
    "evaluation.parser": replace(NAMED, mapped=True),
    "evaluation.equality": replace(NAMED, mapped=True),
    "evaluation.full_batches_of": replace(PER_KIND, null=True),
    "evaluation.judge": MAYBE_MAP,
    "evaluation.judge.model": MAYBE_TEXT,
    "evaluation.judge.revision": MAYBE_TEXT,
    "evaluation.judge.backend": _words("hf", "vllm"),
    "evaluation.judge.dtype": _words(*DTYPES),
    "evaluation.judge.max_new_tokens": COUNT,
    "evaluation.judge.question": TEXT,
    "evaluation.benchmarks": Rule("benchmark", many="list"),
    "evaluation.limit": replace(MAYBE_COUNT, mapped=True),
    "evaluation.batch_size": COUNT,
    "evaluation.backend": _words("hf", "vllm"),
    "evaluation.sandbox": _words("bwrap", "none"),
    "runtime.runs_dir": TEXT,
    "runtime.data_root": MAYBE_TEXT,
    "runtime.cache_dir": TEXT,
    "runtime.checkpoint_every": COUNT,
    "runtime.sharding": _words("auto", "none", "full"),
    "runtime.wandb": _words("off", "offline", "online"),
    "model.name": NAMED,
    "model.path": MAYBE_TEXT,
    "model.revision": MAYBE_TEXT,
    "model.dtype": _words(*DTYPES),
    "model.gguf": MAYBE_MAP,
    "model.pretraining": MAYBE_MAP,
    "task.name": NAMED,
    "task.data.source": replace(NAMED, many="or list"),
    "task.target_modules": replace(TEXT, many="or list", null=True),
    "method.name": NAMED,
    "method.label": NAMED,
    "method.trains": _words("adapter", "all", "nothing"),
    "method.budget": Rule("number", 0, 1, above=True, null=True),
    "method.adapter.target_modules": replace(TEXT, many="or list", null=True),
    "method.adapter.num_blocks": replace(PER_KIND, words=("auto",)),
    "method.adapter.mode": _words("auto", "adapter", "in_place"),
    "method.adapter.dropout": DROPOUT,
    "method.adapter.pattern": _words(*PATTERNS),
    "method.adapter.density": Rule("share", 0, 1, above=True),
    "method.adapter.count": MAYBE_COUNT,
    "method.adapter.down_ratio": Rule("number", 0, 1),
    "method.adapter.o_ratio": Rule("number", 0, 1),
    "method.adapter.block_size": COUNT,
    "method.adapter.r": COUNT,
    "method.adapter.lora_alpha": Rule("number", 0, above=True),
    "method.adapter.lora_dropout": DROPOUT,
    "method.adapter.sparsity": DROPOUT,
    "method.adapter.bottleneck_size": COUNT,
    "method.adapter.num_virtual_tokens": COUNT,
    "method.prepare.iterations": COUNT,
    "method.prepare.score": _words("mean_abs", "abs_mean"),
    "quantization.method": _words("rtn", "nf", "gptq", "magr", "loftq", "apiq"),
    "quantization.bits": Rule("whole", 2, 8),
    "quantization.group_size": Rule("whole", -1),
    "quantization.target_modules": replace(TEXT, many="or list", null=True),
    "quantization.options": MAP,
    "quantization.options.rank": COUNT,
    "quantization.options.lora_alpha": Rule("number", 0, above=True),
    "quantization.options.alpha": replace(AMOUNT, null=True),
    "quantization.options.passes": MAYBE_COUNT,
    "quantization.calibration.text": MAYBE_TEXT,
    "quantization.calibration.samples": COUNT,
    "quantization.calibration.length": COUNT,
}


def stored(key: str, value: Any, default: Any = None) -> Any:
    """A setting's value as it is stored in a run's config. UserError if the setting cannot have it.

    Args:
        default: its value in the config files, which says its type where `SETTINGS` does not.
    """
    rule = SETTINGS.get(_own(key)) or _rule_of(default)
    try:
        kept = _finite(value) if rule is None else rule.stored(value)
        return default if kept == default and kept is not True and kept is not False else kept
    except (ValueError, OverflowError):
        raise UserError(f"{key}={shown(value)}: it must be {rule or 'finite'}") from None


def check(config: Config) -> None:
    """UserError if a setting of a run's config cannot have its value. Those that are missing are not asked for."""
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{name}={shown(config[name])}: it must be a section of settings")
    for key, value in leaves(config):
        if not (value is None and key.startswith("runtime.")):  # paths are taken out of committed runs
            stored(key, value)


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its dotted name; a map that is one setting as a whole."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        rule = SETTINGS.get(_own(key))
        if not isinstance(value, dict) or rule is not None:
            yield key, value
        if isinstance(value, dict) and (rule is None or rule.kind == "map"):
            yield from leaves(value, f"{key}.")


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value) if isinstance(value, int | float) else repr(value)


def _own(key: str) -> str:
    """The name under which `SETTINGS` has a setting of the method that is trained first."""
    key = key.removeprefix("method.first.")
    return "recipe.learning_rate" if key == "learning_rate" else key


def _rule_of(default: Any) -> Rule | None:
    if isinstance(default, list):
        part = _rule_of(default[0]) if default else TEXT
        return part and replace(part, many="list")
    kinds = ((bool, FLAG), (int, Rule("whole", 0)), (float, AMOUNT), (str, TEXT), (dict, MAP))
    return next((rule for kind, rule in kinds if isinstance(default, kind)), None)


def _finite(value: Any) -> Any:
    """A value of unknown type; whole numbers without their `.0`."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else _number(value)
    return value


def _number(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError
    return value
