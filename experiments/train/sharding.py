# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Training with `runtime.sharding=full`: each process holds a part of every parameter, gradient and optimizer state.

accelerate shards the model with FSDP2, layer by layer, when Trainer prepares it. From then on a parameter is a DTensor,
cut along its first dimension, and whole only while its layer computes. The weights, float32 in full fine-tuning, are
the master copy; with `model.dtype=bfloat16` they are gathered and used in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.train.processes import world_size

if TYPE_CHECKING:
    pass


def sharding_of(config: RunConfig) -> str:
    """Return `none` or `full`: `runtime.sharding`, checked against the run and the number of processes."""
    sharding = config.runtime.sharding
    if sharding != "full" or config.method.trains == "nothing":
        return "none"
    if world_size() == 1:
        raise UserError(
            "runtime.sharding=full shards a model over processes, but there is only one: start the training with "
            "torchrun --nproc_per_node N, or plan it again with runtime.sharding=none"
        )
    if (reason := config.not_shardable()) is not None:
        raise UserError(f"runtime.sharding=full: {reason}: plan it with runtime.sharding=none")
    return sharding


def trainer_settings() -> dict[str, Any]:
    """Return the TrainingArguments for sharding."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True},
        # Otherwise every process sums the unsharded gradients of all micro-batches but the last.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def shard_on_cpu(state: Any, arguments: Any) -> None:
    """Set accelerate's state to shard on a CPU: accelerate itself does so only on GPUs, although FSDP2 can."""
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP


def choose_precision(state: Any, in_bf16: bool) -> None:
    """Set the precision: a model trained in full is gathered in bf16, and its gradients are summed in float32.

    With an adapter nothing is cast: the base has 16 bits and the adapter float32, as without sharding.
    """
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    state.fsdp_plugin.mixed_precision_policy = mixed if in_bf16 else MixedPrecisionPolicy()


def norms(gradients: Sequence[torch.Tensor], across: bool) -> torch.Tensor:
    """Return Frobenius norms, at least in float32. `across`: each process passes its part of the tensors."""
    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    pairs = zip(gradients, wide, strict=True)
    each = [cast("torch.Tensor", torch.linalg.vector_norm(part, dtype=dtype)) for part, dtype in pairs]
    if not across:
        return torch.stack(each)
    squares = torch.stack(each).double().square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor; an unsharded tensor is returned whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the tensor of which `part` is this process's part, sharded like `other`."""
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
    """Shard a model that trains before accelerate shards the main one, in the same way.

    Args:
        dtype: dtype of the forward pass, if not that of the weights.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    mesh = init_device_mesh(device, (processes,))
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def release_gathered(model: torch.nn.Module) -> None:
    """Reshard what is still gathered after forward passes without a backward pass, e.g. the output layer."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: torch.nn.Module) -> None:
    """Make an adapter, or a fully trained model, ordinary tensors again, on the CPU of the first process.

    For saving: the model must not be trained or used afterwards. All processes must call this.
    """
    wanted = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # LoRI also saves a factor that is not trained
            wanted |= {parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")}
    first = torch.distributed.get_rank() == 0
    whole: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # keeps tied parameters tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in wanted or not isinstance(parameter, DTensor):
                continue
            if parameter not in whole:
                values = parameter.full_tensor().detach()
                kept = torch.nn.Parameter(values.cpu(), requires_grad=parameter.requires_grad) if first else parameter
                whole[parameter] = kept
            setattr(module, name, whole[parameter])
