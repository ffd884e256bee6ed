"""The serial adapter of Houlsby et al. (arXiv 1902.00751): a small residual network after a linear layer.

PEFT has no such method. A sublayer's last linear layer returns `y + W_up gelu(W_down y + b_down) + b_up` instead of
y, before the result is added to the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,  # also reads the sizes of quantised layers  # pyright: ignore[reportPrivateUsage]
)
from torch import Tensor, nn

from diablo.blocks.mixed_batches import MixedBatches, rows_by_adapter
from diablo.field_help import documented
from diablo.register import peft_type, register
from diablo.targets import CheckedTuner

BOTTLENECK = peft_type("BOTTLENECK")
ENDS_OF_SUBLAYERS = ["o_proj", "down_proj"]


@documented
@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of [`BottleneckModel`].

    Args:
        bottleneck_size: Width of the network between W_down and W_up.
        target_modules: Names (or suffixes) of the linear layers that get a bottleneck after them, or a regular
            expression. None uses the last layers of the sublayers where the architecture is known: o_proj, down_proj.
        exclude_modules: Names (or suffixes) of modules not to adapt, or a regular expression.
        modules_to_save: Modules trained in full and saved with the adapter, e.g. a new classifier.

    Raises:
        ValueError: the size is below 1.
    """

    bottleneck_size: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if (
            isinstance(self.bottleneck_size, bool)
            or not isinstance(self.bottleneck_size, int)
            or self.bottleneck_size < 1
        ):
            raise ValueError(f"bottleneck_size={self.bottleneck_size!r} must be a whole number of at least 1")
        for name in ("target_modules", "exclude_modules"):  # sets, as in PEFT's own configs
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer followed by bottlenecks, keyed by adapter name; each active one gets the base layer's output.

    `bottleneck_down[name]` is `(size, out)`, `bottleneck_up[name]` `(out, size)`, both with a bias. Up starts at 0, so
    that attaching changes no output; down is initialised as any nn.Linear. It cannot be merged, because it is not
    linear.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        if self.out_features is None:
            raise ValueError(f"the sizes of {type(self.get_base_layer()).__name__} are unknown: not a linear layer")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, in float32 whatever the base's dtype, or replace the one of this name."""
        assert self.out_features is not None
        up = nn.Linear(config.bottleneck_size, self.out_features, dtype=torch.float32)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = nn.Linear(self.out_features, config.bottleneck_size, dtype=torch.float32)
        self.bottleneck_up[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Overrides PEFT's version, which would also cast to the base's dtype.
        device = device or next(iter(self.base_layer.state_dict().values())).device  # packed weights are buffers
        for networks in (self.bottleneck_down, self.bottleneck_up):
            if adapter_name in networks and not next(networks[adapter_name].parameters()).is_meta:
                networks[adapter_name].to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x` `(..., in_features)` to `(..., out_features)` in the base layer's output dtype."""
        adapter_names = kwargs.pop("adapter_names", None)
        y = result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            for name, rows in rows_by_adapter(x, adapter_names, self.merged).items():
                if name in self.bottleneck_down:
                    result = result.index_add(0, rows, self._update(name, y[rows]))
            return result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                result = result + self._update(name, y)
        return result

    def _update(self, adapter_name: str, y: Tensor) -> Tensor:
        down, up = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        return up(nn.functional.gelu(down(y.to(next(down.parameters()).dtype)))).to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> BottleneckLayer:
        networks = (self.bottleneck_down, self.bottleneck_up)
        exact = [{name: tensor.detach() for name, tensor in network.named_parameters()} for network in networks]
        super()._apply(fn, recurse)
        for network, before in zip(networks, exact, strict=True):
            for name, parameter in network.named_parameters():
                if parameter.dtype.itemsize < 4 <= before[name].dtype.itemsize:
                    parameter.data = before[name].to(parameter.device)
        return self


class BottleneckModel(CheckedTuner, MixedBatches, BaseTuner):
    """A model with bottlenecks after its target layers, created by `get_peft_model(model, BottleneckConfig(...))`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ENDS_OF_SUBLAYERS)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("bottlenecks are not linear: a weighted sum of weights is not the sum of the updates")

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # part of PEFT's signature; set only for targets that are parameters
    ) -> None:
        assert isinstance(peft_config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        try:
            layer = BottleneckLayer(target, adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None
        self._replace_module(parent, target_name, layer, target)


register(BOTTLENECK, BottleneckConfig, BottleneckModel)
