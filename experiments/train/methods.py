# pyright: reportUnknownMemberType=false
"""What a method does to a base model: attach what is trained, save it, and put it back on a fresh base.

A method's config names a PEFT config class; full fine-tuning and the untouched base are the two cases without one.
Where a method needs data before it is attached, its config also names the function that prepares it.
Everything else in this project treats all methods alike.
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

from experiments.config import Method
from experiments.data import hub
from experiments.errors import UserError, nearest
from experiments.models.quantized import start_from
from experiments.runs.received import check_fields, check_file_names, check_target
from experiments.runs.records import read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
WHOLE_MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
Backward = Callable[[], None]


def peft_config(adapter: Mapping[str, Any]) -> PeftConfig:
    """The PEFT config that `_target_` names, built from the other keys."""
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
    """The config class or function that a dotted name of `diablo` or `peft` stands for."""
    check_target(f"{where}._target_", target)
    package, _, name = target.partition(".")
    with suppress(ImportError):  # of a short name, such as diablo.smt, which is no module of its own
        importlib.import_module(target.rpartition(".")[0])
    try:
        found = attrgetter(name)(importlib.import_module(package))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}._target_={target}: no such {what} ({error})") from None
    # What those modules have imported from elsewhere is found there too.
    check_target(f"{where}._target_", f"{getattr(found, '__module__', '')}.{target.rpartition('.')[2]}")
    if not (dataclasses.is_dataclass(found) if what == "config class" else inspect.isfunction(found)):
        raise UserError(f"{where}._target_={target}: no {what}")
    return found


def attach(
    method: Method,
    base: PreTrainedModel,
    backward: Backward | None = None,
    first: Path | None = None,
    shards: int = 1,
) -> torch.nn.Module:
    """The model to train: the base itself with all or none of its weights trainable, or the base with an adapter.

    Only what the method trains requires a gradient afterwards.

    Args:
        backward: for methods that are prepared with data. Each call adds to the base's gradients that of the mean loss
            over the next `recipe.batch_size` training rows.
        first: the adapter of the run that `method.prerequisite` names.
        shards: of each parameter, over so many processes, once the model is trained.
    """
    base.requires_grad_(method.trains == "all")
    if method.trains != "adapter":
        return base
    import peft

    from diablo.blocks.model import fit_shards
    from diablo.methods.residual import check_start
    from diablo.targets import check_targets

    on_meta = next(base.parameters()).is_meta
    try:
        config = peft_config(_sized(method, base))
        check_targets(base, config)  # PEFT's own methods too
        check_start(base, config)
        config = _prepared(method, base, config, backward, first)
        model = peft.get_peft_model(base, config, low_cpu_mem_usage=on_meta)
        fit_shards(model, shards)
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not _is_quantized(base):  # whose weights cannot be changed
            raise
        raise UserError(f"{method.label} on {base.config.model_type}: {error}") from None
    start = getattr(base, "start_adapter", None)
    if start is not None:
        start_from(model, cast(Path, start), method.label)
    return model


def _is_quantized(base: torch.nn.Module) -> bool:
    from diablo.quantize import quantized_layers

    return bool(quantized_layers(base))


def _prepared(
    method: Method, base: PreTrainedModel, config: PeftConfig, backward: Backward | None, first: Path | None
) -> PeftConfig:
    """The config after the function that `method.prepare` names: `(base, config, backward, first, **settings)`.

    It finds all weights frozen and leaves them and their flags as they are. What attaching needs is in the config it
    returns, or in attributes of the base's modules. The same arguments must give the same result, to the bit.
    """
    settings = dict(method.prepare or {})
    if not settings:
        return config
    prepare = _find("method.prepare", settings.pop("_target_"), "function")
    try:
        inspect.signature(prepare).bind(base, config, backward, first, **settings)
    except TypeError as error:
        raise UserError(f"method.prepare: {error}") from None
    with _deterministic():
        return prepare(base, config, backward, first, **settings)


@contextmanager
def _deterministic() -> Generator[None, None, None]:
    """On a GPU some backward passes add in an order that changes; a run that goes on must find the same start again."""
    import torch

    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def _sized(method: Method, base: PreTrainedModel) -> Mapping[str, Any]:
    """The adapter's fields, with the number of blocks that the method's budget allows where that is left to us."""
    adapter, budget = method.adapter or {}, method.budget
    if (adapter.get("num_blocks") == "auto") != (budget is not None):
        raise UserError("method.adapter.num_blocks=auto and method.budget=… (such as 0.005) belong together: give both")
    if budget is None:
        return adapter
    from diablo import suggest_num_blocks

    targets = adapter["target_modules"]
    return {**adapter, "num_blocks": suggest_num_blocks(base, budget, target_modules=targets)}


def check_checkpointing(method: Method, model: torch.nn.Module) -> None:
    """UserError if gradient checkpointing would take away what is trained: it runs layers without the cache."""
    if getattr(model, "peft_type", None) == "PREFIX_TUNING":
        raise UserError(
            f"runtime.gradient_checkpointing=true: {method.label} puts what it trains into the cache, which "
            f"checkpointing switches off: give false, and a smaller recipe.micro_batch_size"
        )


def forward_modes(model: torch.nn.Module) -> dict[str, str]:
    """How each layer computed with its adapter, for methods that can do it in several ways: layer name -> mode."""
    modules = cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())
    return {name: mode["default"] for name, module in modules if (mode := getattr(module, "forward_mode", None))}


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def initial_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What saving needs from the start of training: A and B of methods that take them out of the base, else nothing."""
    from peft import PeftModel

    from diablo.methods.residual import initial_factors

    return initial_factors(model) if isinstance(model, PeftModel) else {}


def prepared_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What preparing chose and is not trained: whole numbers that the adapter's layers keep, such as indices."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())
    layers = [name for name, layer in modules if isinstance(layer, BaseTunerLayer)]
    buffers = {f"{name}.{key}": tensor for name in layers for key, tensor in model.get_submodule(name).named_buffers()}
    return {name: tensor for name, tensor in buffers.items() if not tensor.is_floating_point()}


def save(method: Method, model: torch.nn.Module, folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """Write what was trained. PEFT's two files for an adapter, the whole model for full fine-tuning."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    from diablo.methods.residual import save_adapter

    if isinstance(model, PeftModel):
        with hub.offline(), warnings.catch_warnings():
            # PEFT would ask the hub, in the middle of a training, whether the vocabulary is the base's.
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
    """PEFT writes a set (of target modules) in an order that each Python process makes up anew."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in content.items():
        if isinstance(getattr(config, name, None), set):
            content[name] = sorted(value)
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def load(method: Method, base: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    """A fresh base with what was trained on it. `merge` folds an adapter into the weights, where the method can.

    A quantised base becomes one of full precision thereby: its dequantised weights with the update. A weight that other
    modules share, as an output layer tied to the embedding, is untied first.
    """
    # Importing from diablo also registers the adapter types that PEFT does not know.
    from diablo.quantize import dequantize_model, merge_dequantized
    from diablo.tied import untie

    quantized = _is_quantized(base)
    if method.trains == "nothing":
        return dequantize_model(base) if merge and quantized else base
    _check_files(folder, method.trains == "all")
    _check_finite(folder)
    if method.trains == "all":  # the base's own config: one that came with the weights could name other code
        trained: Any = type(base).from_pretrained(folder, config=base.config, dtype=base.dtype, use_safetensors=True)
        return trained.to(base.device)
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError, OSError, UserWarning) as error:
        raise UserError(f"{folder}: this adapter does not fit the base model: {error}") from None
    if merge and not _merges(model):
        raise UserError(
            f"evaluation.merge=true: {method.label} cannot be folded into the base's weights: set it to false"
        )
    if not merge:
        return cast(Any, model)
    if not quantized:
        untie(model.get_base_model())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # it is untied now
            return model.merge_and_unload()
    try:
        return merge_dequantized(model)
    except (ValueError, TypeError) as error:
        raise UserError(f"evaluation.merge=true: {method.label} on a quantised base: {error}") from None


def _check_files(folder: Path, whole_model: bool) -> None:
    """UserError if the folder holds what training does not write: PEFT and transformers read whatever they find."""
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
    """UserError if a tensor in the folder's files is not finite: its training failed, whatever it would score."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with cast(Any, safe_open(path, framework="pt")) as file:
                for name in file.keys():  # noqa: SIM118  # it is no dictionary
                    tensor: torch.Tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise UserError(
                            f"{path}: {name} has values that are NaN or infinite, so the training failed: repeat it "
                            f"with a lower recipe.learning_rate"
                        )
        except SafetensorError as error:
            raise UserError(f"{path}: not a complete safetensors file ({error}): train the run again") from None


def _merges(model: torch.nn.Module) -> bool:
    """Whether PEFT can fold the adapter into the weights: prompt methods have no layers, and some layers no merge."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(type(layer).merge is not BaseTunerLayer.merge for layer in layers)
