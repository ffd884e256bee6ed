"""Puts blocks into the linear layers of a model."""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo.config import DIABLO, BlockConfig, DiabloConfig
from diablo.layer import DiabloLayer
from diablo.linear import DiabloLinear
from diablo.places import Places
from diablo.register import register
from diablo.targets import CheckedTuner
from diablo.tied import shared_names

# The paper's choice for LLaMA (section 4): neither the output projection nor the gate.
PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class DiabloModel(CheckedTuner, BaseTuner):
    """A model whose target layers compute `Y = X W0 + X D` with a trainable block-diagonal D (arXiv 2506.03230).

    Every layer has its own block sizes, so the narrow key and value projections of grouped-query attention get
    rectangular blocks. Usually made by `get_peft_model(model, DiabloConfig(...))`.
    """

    prefix = "diablo_"
    tuner_layer_cls = DiabloLayer
    target_module_mapping = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), PAPER_TARGETS)

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
        assert isinstance(peft_config, BlockConfig)
        try:
            quantization = get_quantization_kwargs(self)
            base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            backend = resolve_quantization_backend(base_layer, **quantization)
            if not isinstance(base_layer, nn.Linear | Conv1D) and (backend is None or backend.layer_type != "linear"):
                raise ValueError(
                    f"DiaBlo adapts linear layers, not {type(base_layer).__name__}: take it out of target_modules"
                )
            places = self._places(peft_config, current_key, base_layer)
            if places is not None and 0 in places.shape:
                return  # nothing of this layer is trained
            is_shared = bool(shared_names(self.model, target))
            if isinstance(target, DiabloLayer):
                target.update_layer(adapter_name, peft_config, current_key, is_shared, places)
                return
            layer = DiabloLinear(target, adapter_name, peft_config, current_key, is_shared, places, **quantization)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None
        self._replace_module(parent, target_name, layer, target)

    def _places(self, config: BlockConfig, name: str, base_layer: nn.Module) -> Places | None:
        """Where the blocks of the layer of this name are to be: on the diagonal."""
        return None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        forced = [name for name in names if getattr(self.peft_config.get(name), "mode", None) == "in_place"]
        if forced and len(names) > 1:
            raise ValueError(
                f"adapters {', '.join(names)} cannot be active at once: mode='in_place' of {forced[0]} allows one; "
                "use mode='adapter' or 'auto'"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, DiabloLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            if isinstance(child, DiabloLayer):
                child.prepare_unloading()
            # Unloading puts the complete base layer back. PEFT's version would copy `weight`, which HQQ's layers lack.
            setattr(parent, child_name, new_module)


register(DIABLO, DiabloConfig, DiabloModel)
