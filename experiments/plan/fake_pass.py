# pyright: reportUnknownMemberType=false
"""Memory from shapes: the bytes of a model's tensors, and the allocations of its forward and backward pass.

The pass runs on fake tensors (torch's FakeTensorMode): every operation and every autograd function of the real pass, on
tensors with shapes and dtypes but without values, so that a 13B model takes a second on a laptop.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diablo.quantize.storage import decoder_layers
from experiments.config import Method
from experiments.errors import UserError
from experiments.models.shapes import build_config, empty_base
from experiments.settings import section
from experiments.train import methods
from experiments.train.loss import LOGITS, ChunkedLoss

Config = dict[str, Any]
DEPTHS = (2, 3)  # numbers of decoder layers that are run; their difference is what each further layer adds


def sizes(architecture: str, method: str, dtype: str) -> dict[str, int]:
    """Compute `experiments.plan.sizes.held`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = section(Method, json.loads(method))
    base_numbers = empty_base(json.loads(architecture)).num_parameters()
    model, base = _attached(json.loads(architecture), settings, dtype)
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    try:
        layers = decoder_layers(base)[1]
    except ValueError:
        raise UserError(
            f"model.architecture.model_type={base.config.model_type}: its decoder layers are not where Llama's are: "
            f"its memory cannot be estimated, plan without --dry-run"
        ) from None
    inside = sum(parameter.numel() for parameter in layers.parameters())
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [getattr(module.get_base_layer(), "weight", None) for module in adapted]
    trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
    adapter = settings.adapter or {}
    in_place = adapter.get("mode", "adapter") != "adapter" and not adapter.get("dropout")
    return {
        "frozen_bytes": sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad),
        "trained": trained,
        "base": base_numbers,
        "layer": max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        "root": sum(parameter.numel() for parameter in model.parameters()) - inside,
        "linear": max(module.weight.numel() for module in base.modules() if isinstance(module, nn.Linear)),
        "targets": sum(weight.numel() for weight in weights if isinstance(weight, Tensor)),
        "in_place": trained if in_place else 0,
    }


def peaks(
    architecture: str, method: str, dtype: str, autocast: bool, rows: int, length: int, checkpointing: bool
) -> tuple[int, int]:
    """Compute `experiments.plan.sizes.pass_bytes`."""
    shapes, settings = json.loads(architecture), section(Method, json.loads(method))
    depth = build_config(shapes).num_hidden_layers
    depths = DEPTHS if depth > max(DEPTHS) else (depth,)
    found = [_peaks(shapes, settings, dtype, autocast, rows, length, checkpointing, count) for count in depths]
    # Separately, because the later peak may be of the embedding's gradient, which does not depend on the depth.
    early, late = (few[-1] + (depth - depths[-1]) * (few[-1] - few[0]) for few in zip(*found, strict=True))
    return early, late


def _attached(architecture: Config, method: Method, dtype: str) -> tuple[Any, Any]:
    """Return the model on the meta device with the attached method, and its base."""
    adapter = method.adapter
    if adapter and str(adapter.get("_target_")).startswith("diablo."):
        # In-place training needs values to write, and a recomputed dropout mask takes no memory.
        beside = {"mode": "adapter", "dropout": 0.0}
        method = replace(method, adapter={**adapter, **{key: beside[key] for key in beside if key in adapter}})
    base = empty_base(architecture).to(getattr(torch, dtype))
    return methods.attach(method, base), base


def _first_layers(architecture: Config, method: Method, depth: int) -> tuple[Config, Method]:
    """Return a model of `depth` layers, and a method whose adapter is on each of them, as it may be on the whole."""
    architecture, adapter = {**architecture, "num_hidden_layers": depth}, dict(method.adapter or {})
    adapter.pop("layers_to_transform", None)
    if (method.prepare or {}).get("_target_") == "diablo.smt.choose_blocks":
        from diablo.methods.smt import SmtConfig, all_blocks

        config = methods.peft_config(adapter)
        assert isinstance(config, SmtConfig)
        adapter["num_blocks"] = all_blocks(empty_base(architecture), config)
    return architecture, replace(method, adapter=adapter or None)


def _peaks(
    architecture: Config,
    method: Method,
    dtype: str,
    autocast: bool,
    rows: int,
    length: int,
    checkpointing: bool,
    depth: int,
) -> tuple[int, int]:
    model, base = _attached(*_first_layers(architecture, method, depth), dtype)
    base.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations:
        make_fake(model)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        allocations.begin()
        early: list[int] = []

        def begin_late(gradient: Tensor) -> None:
            if not early:  # with checkpointing, the layer is entered twice
                early.append(allocations.peak)
                allocations.peak = 0

        def entered(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(begin_late)

        decoder_layers(base)[1][-1].register_forward_pre_hook(entered)
        forward_backward(model.train(), tokens, autocast)
    return (early or [allocations.peak])[0], allocations.peak


def forward_backward(model: Any, tokens: Tensor, autocast: bool) -> None:
    """Run a pass as the trainer does, with every position labelled; each gradient is dropped once it is complete."""
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters() if p.requires_grad]
    head = model.get_output_embeddings()
    mask = torch.ones_like(tokens)
    mask[:, -1] = 0  # as with rows of different lengths: without padding there is no mask, and keys are not repeated
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast), _entering(head) as hidden:
        model(input_ids=tokens, attention_mask=mask)
    flat = hidden.pop()[:, -tokens.shape[1] :].flatten(0, 1)  # without the virtual tokens of prompt methods
    labelled = flat.index_select(0, torch.zeros(len(flat), dtype=torch.int64, device=tokens.device))
    del flat
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        chunk = max(1, LOGITS // head.weight.shape[0])
        loss = cast(Tensor, ChunkedLoss.apply(labelled, tokens.flatten(), 1.0, head, chunk, *parameters))
    del labelled
    loss.backward()
    for hook in hooks:
        hook.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _entering(head: nn.Module) -> Generator[list[Tensor], None, None]:
    """Capture the output layer's input and pass it an empty one: experiments/train/loss.py computes it in chunks."""
    hidden: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(inputs[0])
        return (inputs[0][:, :0],)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield hidden
    finally:
        handle.remove()


def make_fake(model: nn.Module) -> None:
    """Replace the model's tensors by fake ones; shared tensors stay shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # keeping the old tensor prevents reuse of its id
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, new)
                tensors[name] = made[id(tensor)][1]  # pyright: ignore[reportArgumentType]


class Allocations(TorchDispatchMode):
    """Tracks the bytes of storages that operations allocate while this mode is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self._start = 0
        self._known: set[int] = set()

    def begin(self) -> None:
        """Start counting here."""
        self._start, self.peak = self.held, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls, without any allocation
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._known:
            return
        self._known.add(key)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held - self._start)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
