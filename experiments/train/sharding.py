# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Training with `runtime.sharding=full`: each process holds a part of every parameter, gradient and optimizer state.

accelerate shards the model with FSDP2, layer by layer, when Trainer prepares it. A parameter is a DTensor from then on,
cut along its first dimension, and whole only while its layer computes. The weights, float32 in full fine-tuning, are
the master copy; with `model.dtype=bfloat16` they are gathered, and computed with, in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.train.processes import world_size

if TYPE_CHECKING:
    import torch


def sharding_of(config: RunConfig) -> str:
    """`none` or `full`: `runtime.sharding`, checked against what the run is and how many processes it has."""
    sharding = config.runtime.sharding
    if sharding != "full" or config.method.trains == "nothing":
        return "none"
    if world_size() == 1:
        raise UserError(
            "runtime.sharding=full shares a model among processes, and this is the only one: start the training with "
            "torchrun --nproc_per_node N, or plan it again with runtime.sharding=none"
        )
    if (reason := not_shardable(config)) is not None:
        raise UserError(f"runtime.sharding=full: {reason}: plan it with runtime.sharding=none")
    return sharding


def not_shardable(config: RunConfig) -> str | None:
    """Why a run cannot be sharded; None if it can."""
    if config.quantization is not None:
        return "every process would hold all of a quantised base, whose weights are not parameters"
    if config.spectra is not None:
        return "spectra (spectra.every) are measured where a process has whole weights"
    return None


def trainer_settings() -> dict[str, Any]:
    """What TrainingArguments take for it."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True},
        # Else the gradients of all micro-batches but the last are summed whole on every process.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def shard_on_cpu(state: Any, arguments: Any) -> None:
    """accelerate shards on GPUs alone, FSDP2 does so on a CPU too: tell accelerate's state that it is to."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP


def choose_precision(state: Any, in_bf16: bool) -> None:
    """For a model trained in full bf16 copies are gathered of its float32 weights, and gradients are added in float32.

    Nothing is cast where an adapter is trained: the base has its 16 bits, and the adapter float32, as without sharding.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    state.fsdp_plugin.mixed_precision_policy = mixed if in_bf16 else MixedPrecisionPolicy()


def norms(gradients: Sequence[torch.Tensor], across: bool) -> torch.Tensor:
    """Frobenius norms, in float32 at least. `across`: of tensors of which each process has given its part."""
    import torch

    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    pairs = zip(gradients, wide, strict=True)
    each = [cast("torch.Tensor", torch.linalg.vector_norm(part, dtype=dtype)) for part, dtype in pairs]
    if not across:
        return torch.stack(each)
    squares = torch.stack(each).double().square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, which is all of it where it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor of which each process has the part that it has of `other`."""
    from torch.distributed.tensor import DTensor

    if not isinstance(other, DTensor):
        return part
    return DTensor.from_local(
        part.to(other.device),
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )


def shard_layers(model: Any, device: str, processes: int, dtype: torch.dtype | None) -> None:
    """For a model that trains before the one that accelerate shards, in the same way.

    Args:
        dtype: of the forward pass, where it is not that of the weights.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    mesh = init_device_mesh(device, (processes,))
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def release_gathered(model: torch.nn.Module) -> None:
    """After forward passes without a backward pass, the output layer and what is outside the layers are still whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: torch.nn.Module) -> None:
    """Make all of an adapter, or of a model trained in full, ordinary tensors again, on the CPU of the first process.

    For saving: the model is not trained or used any more. All processes have to call this.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.distributed.tensor import DTensor

    wanted = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # LoRI saves a factor that it does not train
            wanted |= {parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")}
    first = torch.distributed.get_rank() == 0
    whole: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in wanted or not isinstance(parameter, DTensor):
                continue
            if parameter not in whole:
                values = parameter.full_tensor().detach()
                kept = torch.nn.Parameter(values.cpu(), requires_grad=parameter.requires_grad) if first else parameter
                whole[parameter] = kept
            setattr(module, name, whole[parameter])
