"""Checks that everything a config names is in the model.

PEFT raises an error only if all names together match nothing: with one misspelt name, fewer layers than requested are
trained, silently. `check_targets` checks each name before anything is attached. It needs no weights: a model on the
meta device is enough.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from typing import Any, cast

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,  # pyright: ignore[reportPrivateUsage]
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import DUMMY_TARGET_MODULES, SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from diablo.tied import untie

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")  # for these tasks PEFT adds both usual names of a head to modules_to_save
SHOWN = 12  # names in a message


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise an error if something that the config names is not in the model.

    Configs of adapters loaded for inference and methods without target modules are not checked.

    Raises:
        ValueError: a name in `target_modules`, `target_parameters`, `exclude_modules` or `modules_to_save`, an index in
            `layers_to_transform`, or a layer in `num_blocks`, `blocks`, `rank_pattern` or `alpha_pattern` matches
            nothing; or `target_modules` matches experts that are one 3-D parameter.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(cast(PeftType, config.peft_type))
    if config.inference_mode or not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        return
    targets: Any = getattr(config, "target_modules", None)
    if targets == DUMMY_TARGET_MODULES:
        return
    try:
        _Check(model, config, tuner).run(targets)
    except re.error as error:
        raise ValueError(
            f"{error.pattern!r} is not a regular expression ({error}): give a list of names instead"
        ) from None


def expert_names(model: nn.Module) -> list[str]:
    """Return the names that the linear layers of experts would have if experts were not one 3-D parameter.

    For each such parameter: its own name and those of its parts in checkpoints, which were module names in
    transformers 4, e.g. gate_proj and up_proj for gate_up_proj.
    """
    found = [
        prefix if name == "weight" else f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if not isinstance(module, BaseTunerLayer | nn.Conv1d | nn.ConvTranspose1d)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1
    ]
    if not found:
        return []
    parts: dict[str, set[str]] = {}
    for conversion in get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else ():
        sources = {_last(source.removesuffix(".weight")) for source in conversion.source_patterns}
        for target in conversion.target_patterns:
            parts.setdefault(_last(target), set()).update(sources)
    names = [(name.rpartition(".")[0], _last(name)) for name in found]
    return [f"{prefix}.{part}" for prefix, last in names for part in sorted({last} | parts.get(last, set()))]


class _Check:
    def __init__(self, model: nn.Module, config: PeftConfig, tuner: type[BaseTuner]) -> None:
        self.model, self.config, self.tuner = model, config, tuner
        self.kind = type(model).__name__
        self.names = _module_names(model)
        self.experts = expert_names(model)
        self.weights = [name for name in self.names if _has_matrix(model.get_submodule(name))]

    def run(self, targets: Any) -> None:
        self._other_names()
        if not targets:  # the method's own choice for the architecture, or nothing but parameters
            return
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            if inside := self._matching(self.experts, target_modules=set(self.experts)):
                raise ValueError(
                    f"target_modules={targets!r} would leave out {_two_parts(inside)}: {self._experts_are()}; name the "
                    "target_modules one by one, or leave the experts out by exclude_modules='.*experts.*'"
                )
            self.config = _maybe_include_all_linear_layers(copy.copy(self.config), self.model)
            self._excluded()
            self._layers()
            return
        if inside := self._matching(self.experts):
            raise ValueError(
                f"target_modules={_listed(targets)} matches {_two_parts(inside)}: {self._experts_are()}; leave such "
                "names out, or give longer ones that match linear layers only"
            )
        alone = {targets: targets} if isinstance(targets, str) else {name: {name} for name in sorted(targets)}
        for target, only in alone.items():
            if not self._wanted(target_modules=only, layers_to_transform=None):
                if isinstance(targets, str) and any(_ends_with(name, targets) for name in self.names):
                    raise ValueError(
                        f"target_modules={targets!r} is an expression for whole names and matches none of {self.kind}: "
                        f"give the list [{targets!r}]"
                    )
                hint, experts = _hint(target, self.weights), f" ({self._experts_are()})" if self.experts else ""
                raise ValueError(f"target_modules: {target} matches no module of {self.kind}: {hint}{experts}")
        indices: Any = getattr(self.config, "layers_to_transform", None)
        if indices is not None:
            self._layer_indices([indices] if isinstance(indices, int) else indices)
            for target, only in alone.items():
                if not self._wanted(target_modules=only):
                    raise ValueError(f"target_modules: {target} matches no module in layers_to_transform={indices}")
        self._excluded()
        self._layers()

    def _matching(self, names: list[str], **changes: Any) -> list[str]:
        """Return the names that PEFT takes for targets under a config with these changes."""
        config = copy.copy(self.config)
        for key, value in changes.items():
            setattr(config, key, value)
        return [name for name in names if self.tuner._check_target_module_exists(config, name)]

    def _wanted(self, **changes: Any) -> list[str]:
        """Return the targets, including those that other settings exclude on purpose."""
        return self._matching(self.names, **{"exclude_modules": None, "modules_to_save": None, **changes})

    def _layer_indices(self, indices: list[int]) -> None:
        # A target that is a complete name matches whatever the index is; leave these out.
        free = set(self._wanted(layers_to_transform=[-1]))
        layered = [name for name in self._wanted(layers_to_transform=None) if name not in free]
        numbers = sorted({int(part) for name in layered for part in name.split(".") if part.isdigit()})
        known = [n for n in numbers if self._matching(layered, layers_to_transform=[n])]
        for index in indices:
            if index not in known:
                pattern = getattr(self.config, "layers_pattern", None)
                counted = f" with layers_pattern={pattern!r}" if pattern else ""
                span = f"they are in {known[0]} to {known[-1]}" if known else f"none has a number{counted}"
                raise ValueError(f"layers_to_transform: no target is in layer {index}, {span}")

    def _excluded(self) -> None:
        """Check `exclude_modules`: PEFT excludes modules of these names, but not the modules inside them."""
        names: Any = getattr(self.config, "exclude_modules", None) or ()
        targets = self._matching(self.names)
        for name in () if isinstance(names, str) else sorted(names):
            holders = tuple(f"{key}." for key in self.names if _ends_with(key, name))
            inside = [target for target in targets if target.startswith(holders)]
            if inside:
                raise ValueError(
                    f"exclude_modules: {name} holds targets, which stay targets ({_two_parts(inside)}): name these, or "
                    f"give an expression such as exclude_modules={f'.*{re.escape(name)}.*'!r}"
                )

    def _layers(self) -> None:
        """Check the settings that give single layers their own value."""
        targets = self._wanted()
        for field in ("num_blocks", "blocks"):
            value = getattr(self.config, field, None)
            for key in value if isinstance(value, dict) else ():
                if not any(_ends_with(name, key) for name in targets):
                    raise ValueError(f"{field}: {key} is no target of {self.kind}: {_hint(key, targets)}")
        if getattr(self.config, "target_parameters", None):  # whose names the patterns may mean
            return
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self.config, field, None) or ():
                if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets):  # as PEFT reads them
                    raise ValueError(f"{field}: {key} matches no target of {self.kind}: {_hint(key, targets)}")

    def _other_names(self) -> None:
        excluded: Any = getattr(self.config, "exclude_modules", None) or ()
        known = [*self.names, *self.experts]
        if isinstance(excluded, str):
            if not any(re.fullmatch(excluded, name) for name in known):
                raise ValueError(
                    f"exclude_modules: {excluded} matches no module of {self.kind}: {_hint(excluded, known)}"
                )
        else:
            self._all_in("exclude_modules", excluded, known)
        heads = SEQ_CLS_HEAD_NAMES if self.config.task_type in CLASSIFIERS else ()
        saved = [name for name in getattr(self.config, "modules_to_save", None) or () if name not in heads]
        everywhere = [name for name, _ in self.model.named_modules(remove_duplicate=False)]
        for name in saved:
            if not any(key.endswith(name) for key in everywhere):  # as PEFT reads them
                raise ValueError(f"modules_to_save: {name} matches no module of {self.kind}: {_hint(name, self.names)}")
        parameters = [name.replace(".base_layer", "") for name, _ in self.model.named_parameters()]
        self._all_in("target_parameters", getattr(self.config, "target_parameters", None) or (), parameters)

    def _all_in(self, field: str, names: Iterable[str], known: list[str]) -> None:
        what = "parameter" if field == "target_parameters" else "module"
        for name in sorted(names):
            if not any(_ends_with(key, name) for key in known):
                raise ValueError(f"{field}: {name} matches no {what} of {self.kind}: {_hint(name, known)}")

    def _experts_are(self) -> str:
        trained = "; PEFT's LoRA trains them by target_parameters" if self.config.peft_type == PeftType.LORA else ""
        return f"the experts of {self.kind} are 3-D parameters, not linear layers{trained}"


class CheckedTuner:
    """Mixin before PEFT's tuner: checks what a config names, and unties weights before merging."""

    peft_config: dict[str, PeftConfig]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("state_dict") is None:  # else its keys say which modules are adapted
            check_targets(model, self.peft_config[adapter_name])
        peft: Any = super()
        peft.inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        tuner, peft = cast(BaseTuner, self), cast(Any, super())
        peft._check_merge_allowed()
        untie(tuner.model)


def _module_names(model: nn.Module) -> list[str]:
    """Return the names of all modules except the model itself and those inside attached adapters."""
    found: list[str] = []
    adapter = None
    for name, module in model.named_modules():
        if adapter is not None and name.startswith(f"{adapter}."):
            continue
        adapter = name if isinstance(module, BaseTunerLayer) else None
        found.append(name)
    return found[1:]


def _has_matrix(module: nn.Module) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return isinstance(module, BaseTunerLayer) or any(tensor.ndim == 2 for tensor in tensors)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _hint(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest endings of known names, with as many parts as this name; all last parts if none is near."""
    parts = name.count(".") + 1
    endings = sorted({".".join(key.split(".")[-parts:]) for key in known})
    close = difflib.get_close_matches(name, endings, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {_shown(sorted({_last(key) for key in known if not _last(key).isdigit()}))}"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _two_parts(names: list[str]) -> str:
    return _shown(sorted({".".join(name.split(".")[-2:]) for name in names}))


def _listed(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else f"[{_shown(sorted(targets))}]"
