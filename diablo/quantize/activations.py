"""Hidden states of the calibration sequences as they pass through a model's decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Factors = dict[str, tuple[Tensor, Tensor]]  # LoRA's A (r, in) and B (out, r), by linear layer


class Activations:
    """The inputs of the next decoder layer, for each sequence.

    `quantized` has passed through the quantised layers so far, `full` through the full-precision ones (only updated if
    the method needs it), each `(1, length, hidden)`; `kwargs` holds a layer's other arguments.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, calibration: Tensor) -> None:
        kinds = sorted(set(getattr(model.config, "layer_types", None) or []))
        if len(kinds) > 1:  # e.g. Gemma's: sliding-window layers get another mask
            raise ValueError(
                f"{type(model).__name__} has layers of several kinds ({', '.join(kinds)}), but calibration calls all "
                "of them with the first layer's arguments: choose a method that needs no calibration"
            )
        self.quantized: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

        class Reached(Exception):
            pass

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            self.quantized.append(args[0])
            self.kwargs.append(kwargs)
            raise Reached

        hook = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for row in calibration:
                try:
                    model(input_ids=row[None].to(model.device), use_cache=False)
                except Reached:
                    continue
        finally:
            hook.remove()
        self.full = self.quantized

    def through(
        self, name: str, layer: nn.Module, states: list[Tensor], factors: Factors | None = None, scaling: float = 1.0
    ) -> list[Tensor]:
        """Return the outputs of a decoder layer; with factors, `scaling * B A` is added to its linear layers' weights.

        Raises:
            ValueError: an output is not finite.
        """
        return list(self._each(name, layer, states, factors, scaling))

    def _each(
        self, name: str, layer: nn.Module, states: list[Tensor], factors: Factors | None = None, scaling: float = 1.0
    ) -> Iterator[Tensor]:
        def beside(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
            return lambda _, args, output: output + (scaling * (args[0].float() @ a.T) @ b.T).to(output.dtype)

        hooks = [layer.get_submodule(n).register_forward_hook(beside(*ab)) for n, ab in (factors or {}).items()]
        device = next(layer.parameters()).device
        try:
            for x, kwargs in zip(states, self.kwargs, strict=True):
                output = first(layer(moved(x, device), **moved(kwargs, device))).to(x.device)
                if not output.isfinite().all():
                    raise ValueError(f"{name}: activations are not finite (NaN or infinity): check the base model")
                yield output
        finally:
            for hook in hooks:
                hook.remove()

    def gram_matrices(self, name: str, layer: nn.Module) -> dict[str, Tensor]:
        """Return `XᵀX` of the inputs of each linear layer in a decoder layer, float32, over all sequences."""
        grams: dict[str, Tensor] = {}

        def watch(linear: str) -> Callable[..., None]:
            def add(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                grams[linear] = grams[linear].addmm_(x.T, x) if linear in grams else x.T @ x

            return add

        linears = [(n, module) for n, module in layer.named_modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_pre_hook(watch(n)) for n, module in linears]
        try:
            for _ in self._each(name, layer, self.quantized):  # outputs are discarded
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return grams


def first(output: Any) -> Tensor:
    """Return the hidden states of a decoder layer's output, which is a tuple in some models."""
    return output[0] if isinstance(output, tuple) else output


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move (nested) arguments to a device; with a dtype, also cast floating-point tensors."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    return tuple(moved(item, device, dtype) for item in value) if isinstance(value, tuple) else value
