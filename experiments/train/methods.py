# pyright: reportUnknownMemberType=false
"""Applies a method to a base model: attach what is trained, save it, and load it onto a fresh base.

A method's config names a PEFT config class, except full fine-tuning and the untouched base. If a method needs data
before it is attached, its config also names the function that prepares it. All other code treats all methods alike.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from diablo import suggest_num_blocks
from diablo.blocks.model import fit_shards
from diablo.methods.residual import check_start, initial_factors, save_adapter
from diablo.quantize import dequantize_model, merge_dequantized, quantized_layers
from diablo.targets import check_targets
from diablo.tied import untie
from experiments.config import Method
from experiments.data import hub
from experiments.errors import UserError, nearest
from experiments.models.quantized import start_from
from experiments.runs.received import check_fields, check_file_names, check_target
from experiments.runs.records import CARD, read_json

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", CARD)
WHOLE_MODEL = (CARD, "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
Backward = Callable[[], None]


def peft_config(adapter: Mapping[str, Any]) -> PeftConfig:
    """Return the PEFT config of the class `_target_`, built from the other keys."""
    fields = dict(adapter)
    kind = _find("method.adapter", fields.pop("_target_"), "config class")
    check_fields("method.adapter", fields)
    known = {field.name for field in dataclasses.fields(kind)}
    for key in fields:
        if key not in known:
            raise UserError(f"method.adapter.{key}: {kind.__name__} has no such field: {nearest(key, known)}")
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"method.adapter: {error}") from None


def _find(where: str, target: str, what: str) -> Any:
    """Return the config class or function with a dotted name in `diablo` or `peft`."""
    check_target(f"{where}._target_", target)
    package, _, name = target.partition(".")
    with suppress(ImportError):  # raised for a short name, e.g. diablo.smt, which is not a module itself
        importlib.import_module(target.rpartition(".")[0])
    try:
        found = attrgetter(name)(importlib.import_module(package))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}._target_={target}: no such {what} ({error})") from None
    # Those modules also expose names imported from elsewhere.
    check_target(f"{where}._target_", f"{getattr(found, '__module__', '')}.{target.rpartition('.')[2]}")
    if not (dataclasses.is_dataclass(found) if what == "config class" else inspect.isfunction(found)):
        raise UserError(f"{where}._target_={target}: not a {what}")
    return found


def attach(
    method: Method,
    base: PreTrainedModel,
    backward: Backward | None = None,
    prerequisite: Path | None = None,
    shards: int = 1,
) -> torch.nn.Module:
    """Return the model to train: the base with all or no weights trainable, or the base with an adapter.

    Afterwards only what the method trains requires a gradient.

    Args:
        backward: for methods prepared with data. Each call adds to the base's gradients that of the mean loss over the
            next `recipe.batch_size` training rows.
        prerequisite: the adapter of the run that `method.prerequisite` names.
        shards: number of processes that will share each parameter when the model is trained.
    """
    base.requires_grad_(method.trains == "all")
    if method.trains != "adapter":
        return base
    on_meta = next(base.parameters()).is_meta
    try:
        config = peft_config(_sized(method, base))
        check_targets(base, config)  # also for PEFT's own methods
        check_start(base, config)
        config = _prepared(method, base, config, backward, prerequisite)
        model = peft.get_peft_model(base, config, low_cpu_mem_usage=on_meta)
        fit_shards(model, shards)
    except (ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, TypeError) and not _is_quantized(base):  # a quantised base's weights cannot be changed
            raise
        raise UserError(f"{method.label} on {base.config.model_type}: {error}") from None
    start = getattr(base, "start_adapter", None)
    if start is not None:
        start_from(model, cast(Path, start), method.label)
    return model


def _is_quantized(base: torch.nn.Module) -> bool:
    return bool(quantized_layers(base))


def _prepared(
    method: Method, base: PreTrainedModel, config: PeftConfig, backward: Backward | None, prerequisite: Path | None
) -> PeftConfig:
    """Call `method.prepare`'s function, `(base, config, backward, prerequisite, **settings)`, and return its config.

    The function gets all weights frozen and must not change them or their flags. Its results are in the returned
    config or in attributes of the base's modules. Equal arguments must give bit-equal results.
    """
    settings = dict(method.prepare or {})
    if not settings:
        return config
    prepare = _find("method.prepare", settings.pop("_target_"), "function")
    try:
        inspect.signature(prepare).bind(base, config, backward, prerequisite, **settings)
    except TypeError as error:
        raise UserError(f"method.prepare: {error}") from None
    with _deterministic():
        return prepare(base, config, backward, prerequisite, **settings)


@contextmanager
def _deterministic() -> Generator[None, None, None]:
    """Make GPU backward passes deterministic, so that a resumed run prepares exactly the same start."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def _sized(method: Method, base: PreTrainedModel) -> Mapping[str, Any]:
    """Return the adapter's fields; `num_blocks: auto` becomes the number that the method's budget allows."""
    adapter, budget = method.adapter or {}, method.budget
    if (adapter.get("num_blocks") == "auto") != (budget is not None):
        raise UserError("method.adapter.num_blocks=auto and method.budget=… (e.g. 0.005) belong together: give both")
    if budget is None:
        return adapter
    targets = adapter["target_modules"]
    return {**adapter, "num_blocks": suggest_num_blocks(base, budget, target_modules=targets)}


def check_checkpointing(method: Method, model: torch.nn.Module) -> None:
    """Raise a UserError if gradient checkpointing would bypass what is trained: it runs layers without the cache."""
    if getattr(model, "peft_type", None) == "PREFIX_TUNING":
        raise UserError(
            f"runtime.gradient_checkpointing=true: {method.label} trains tensors in the cache, which "
            f"checkpointing disables: give false, and a smaller recipe.micro_batch_size"
        )


def forward_modes(model: torch.nn.Module) -> dict[str, str]:
    """Return how each layer applied its adapter, for methods with several modes: layer name -> mode."""
    modules = cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())
    return {name: mode["default"] for name, module in modules if (mode := getattr(module, "forward_mode", None))}


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained tensors by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def initial_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what saving needs from the start: A and B of methods that subtract them from the base, else nothing."""
    return initial_factors(model) if isinstance(model, PeftModel) else {}


def prepared_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return untrained tensors chosen in preparation: integers that the adapter's layers keep, e.g. indices."""
    modules = cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())
    layers = [name for name, layer in modules if isinstance(layer, BaseTunerLayer)]
    buffers = {f"{name}.{key}": tensor for name in layers for key, tensor in model.get_submodule(name).named_buffers()}
    return {name: tensor for name, tensor in buffers.items() if not tensor.is_floating_point()}


def save(method: Method, model: torch.nn.Module, folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """Write what was trained: PEFT's two files for an adapter, the whole model for full fine-tuning."""
    if isinstance(model, PeftModel):
        with hub.offline(), warnings.catch_warnings():
            # PEFT would ask the hub, in the middle of training, whether the vocabulary is the base's.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            save_adapter(model, folder, initial)
        _sort_sets(model.peft_config["default"], folder / "adapter_config.json")
    elif method.trains == "all":
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes 0600 whatever the umask
    else:
        folder.mkdir(parents=True, exist_ok=True)


def _sort_sets(config: Any, path: Path) -> None:
    """Sort sets in the file: PEFT writes a set (of target modules) in an order that differs between processes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in content.items():
        if isinstance(getattr(config, name, None), set):
            content[name] = sorted(value)
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def load(method: Method, base: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    """Load what was trained onto a fresh base. `merge`: merge an adapter into the weights, if the method can.

    Merging turns a quantised base into one of full precision: its dequantised weights plus the update. A weight that
    other modules share, e.g. an output layer tied to the embedding, is untied first.
    """
    # Importing diablo also registers the adapter types that PEFT does not have.
    quantized = _is_quantized(base)
    if method.trains == "nothing":
        return dequantize_model(base) if merge and quantized else base
    _check_files(folder, method.trains == "all")
    _check_finite(folder)
    if method.trains == "all":  # the base's own config, because one stored with the weights could name other code
        trained: Any = type(base).from_pretrained(folder, config=base.config, dtype=base.dtype, use_safetensors=True)
        return trained.to(base.device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError, OSError, UserWarning) as error:
        raise UserError(f"{folder}: this adapter does not fit the base model: {error}") from None
    if merge and not _merges(model):
        raise UserError(
            f"evaluation.merge=true: {method.label} cannot be merged into the base's weights: set it to false"
        )
    if not merge:
        return cast(Any, model)
    if not quantized:
        untie(model.get_base_model())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # already untied
            return model.merge_and_unload()
    try:
        return merge_dequantized(model)
    except (ValueError, TypeError) as error:
        raise UserError(f"evaluation.merge=true: {method.label} on a quantised base: {error}") from None


def _check_files(folder: Path, whole_model: bool) -> None:
    """Raise a UserError for files that training does not write: PEFT and transformers read whatever they find."""
    known = WHOLE_MODEL if whole_model else ADAPTER_FILES
    for path in sorted(folder.iterdir()):
        if not any(path.match(name) for name in known):
            raise UserError(f"{path}: training does not write such a file: remove it")
        if path.name.endswith(".json"):
            content = read_json(path)
            check_fields(str(path), content)
            weight_map: dict[str, Any] = content.get("weight_map") or {}
            check_file_names(path, set(weight_map.values()))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no weights: train the run again")


def _check_finite(folder: Path) -> None:
    """Raise a UserError if a tensor in the folder's files is not finite: its training failed."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with cast(Any, safe_open(path, framework="pt")) as file:
                for name in file.keys():  # noqa: SIM118  # not a dictionary
                    tensor: torch.Tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise UserError(
                            f"{path}: {name} has values that are NaN or infinite, so the training failed: repeat it "
                            f"with a lower recipe.learning_rate"
                        )
        except SafetensorError as error:
            raise UserError(f"{path}: not a complete safetensors file ({error}): train the run again") from None


def _merges(model: torch.nn.Module) -> bool:
    """Return whether PEFT can merge the adapter: prompt methods have no layers, and some layers have no merge."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(type(layer).merge is not BaseTunerLayer.merge for layer in layers)
