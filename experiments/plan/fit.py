"""Whether a run fits on GPUs of a given memory, on how many, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.plan.choose import setting_label
from experiments.plan.memory import Memory, estimate
from experiments.runs.sizes import counted, gibibytes
from experiments.settings import with_values

PROCESS = 600 * 2**20  # bytes of a worker beside its run: libraries, or CUDA's context and kernels
USABLE = 0.92  # share of a GPU's memory; CUDA's context, NCCL's buffers and fragmentation take the rest


def gpus_needed(config: RunConfig, gpu_bytes: int, largest: int) -> int:
    """Return the fewest GPUs that a run fits on, among numbers that divide its batch; UserError if there are none.

    On several GPUs it is sharded, unless `runtime.sharding=none`.
    """
    check_divides(config, 1)
    if config.method.trains == "nothing":
        return 1
    least = 2 if config.runtime.sharding == "full" else 1
    most = largest if "full" in _shardings(config, largest) else 1  # without sharding, more GPUs save no memory
    counts = [gpus for gpus in _counts(config, most) if gpus >= least]
    found = next((gpus for gpus in counts if fits(estimate(_settled(config, gpus), gpus), gpu_bytes)), None)
    if found is None:
        raise UserError(does_not_fit(config, counts[-1] if counts else 1, gpu_bytes, largest))
    return found


def check_fits(config: RunConfig, gpus: int, gpu_bytes: int, largest: int) -> None:
    """Raise a UserError if a run does not fit on this many GPUs, or if its batch does not divide over them."""
    if not gpus:
        return
    check_divides(config, gpus)  # also for runs that train nothing, whose process checks it too
    if config.method.trains == "nothing":
        return
    if not any(fits(estimate(with_sharding(config, each), gpus), gpu_bytes) for each in _shardings(config, gpus)):
        raise UserError(does_not_fit(config, gpus, gpu_bytes, largest))


def sharding_on(config: RunConfig, gpus: int, gpu_bytes: int | None) -> str:
    """Return how a run trains on this many GPUs: `runtime.sharding`; `auto` is `none` (DDP) if the whole fits on each.

    Args:
        gpu_bytes: memory of one GPU; if None, nothing is sharded unless requested.
    """
    first, *others = _shardings(config, gpus)
    if others and gpu_bytes is not None and not fits(estimate(with_sharding(config, first), gpus), gpu_bytes):
        return others[0]
    return first


def _shardings(config: RunConfig, gpus: int) -> list[str]:
    """Return the options that `runtime.sharding` allows, the fastest first."""
    asked = config.runtime.sharding
    if config.method.trains == "nothing":
        return ["none"]
    if asked == "full":
        if (reason := config.not_shardable()) or gpus < 2:
            why = reason or f"{setting_label(config)} gets {max(1, gpus)} GPU: give more"
            raise UserError(f"runtime.sharding=full: {why}, or runtime.sharding=auto")
        return ["full"]
    return ["none"] if asked == "none" or gpus < 2 or config.not_shardable() else ["none", "full"]


def with_sharding(config: RunConfig, sharding: str) -> RunConfig:
    return with_values(config, {"runtime.sharding": sharding})


def _settled(config: RunConfig, gpus: int) -> RunConfig:
    """Return the config with the allowed sharding that needs the least memory."""
    return with_sharding(config, _shardings(config, gpus)[-1])


def check_divides(config: RunConfig, gpus: int) -> None:
    """Raise a UserError if a batch is not whole micro-batches on each GPU; training would only find it hours later."""
    recipe = config.recipe
    if recipe.batch_size % (recipe.micro_batch_size * gpus):
        known = ", ".join(map(str, _counts(config, recipe.batch_size)))
        raise UserError(
            f"{setting_label(config)}: recipe.batch_size={recipe.batch_size} is not a multiple of "
            f"recipe.micro_batch_size={recipe.micro_batch_size} × {counted(gpus, 'GPU')}: give "
            + (f"{known} GPUs, or " if known else "")
            + "another recipe.micro_batch_size"
        )


def fits(memory: Memory, gpu_bytes: int) -> bool:
    return memory.peak <= USABLE * gpu_bytes


def check_workers(configs: Sequence[RunConfig], workers: int, memory_bytes: int) -> None:
    """Raise a UserError if any `workers` runs that follow each other do not fit into the memory of one device together.

    Runs start in their order, so those side by side are mostly neighbours; one that takes much longer than the others
    can meet later ones, which this does not see. One run stands for all of its model, method, task, micro-batch and
    quantisation: sizes of adapters matter little beside the activations.
    """
    kinds = [
        (
            *(config.model.name, config.method.name, config.task.name),
            *(config.recipe.micro_batch_size, config.quantization is None),
        )
        for config in configs
    ]
    examples = dict(zip(kinds, configs, strict=True))
    peaks = {kind: estimate(config).peak + PROCESS for kind, config in examples.items()}
    needs = [peaks[kind] for kind in kinds]
    usable = int(USABLE * memory_bytes)
    together = _most_of_neighbours(needs, workers)
    if together > usable:
        most = next(count for count in range(workers - 1, -1, -1) if _most_of_neighbours(needs, count) <= usable)
        mend = f"give at most {most}" if most else "give a smaller recipe.micro_batch_size and no --workers"
        raise UserError(
            f"--workers {workers}: {counted(min(workers, len(needs)), 'run')} at the same time need up to "
            f"{gibibytes(together)}, and {gibibytes(usable)} are usable here: {mend}"
        )


def _most_of_neighbours(needs: Sequence[int], count: int) -> int:
    """Return the largest sum of `count` needs in a row, or of all if there are fewer."""
    return max((sum(needs[first : first + count]) for first in range(max(1, len(needs) - count + 1))), default=0)


def does_not_fit(config: RunConfig, gpus: int, gpu_bytes: int, largest: int) -> str:
    """Return one line: the memory needed and available, and the smallest changes that help."""
    needs = estimate(_settled(config, gpus), gpus)
    where = f"each of {gpus} GPUs" if gpus > 1 else "one GPU"
    why = " while it chooses what to train" if needs.preparation > needs.training else ""
    single = [_first(kind, gpu_bytes) for kind in _single_changes(config, gpus, largest)]
    changes = list(filter(None, single)) or list(filter(None, [_first(_several_changes(config, largest), gpu_bytes)]))
    quantised = ", or quantization=nf" if config.method.trains == "adapter" and config.quantization is None else ""
    mend = f"give {', or '.join(changes)}" if changes else f"give GPUs with more memory{quantised}"
    return (
        f"{setting_label(config)} does not fit: it needs {gibibytes(needs.peak)}{why}, and "
        f"{gibibytes(int(USABLE * gpu_bytes))} are usable on {where}: {mend}"
    )


def _first(changes: Iterator[tuple[str, Memory]], gpu_bytes: int) -> str | None:
    """Return the first change with which the run fits, and the memory it then needs."""
    return next((f"{text} ({gibibytes(memory.peak)})" for text, memory in changes if fits(memory, gpu_bytes)), None)


def _single_changes(config: RunConfig, gpus: int, largest: int) -> Iterator[Iterator[tuple[str, Memory]]]:
    """Yield the changes of each kind, the smallest first."""
    if not config.not_shardable():
        whole = _shardings(config, gpus)[-1] == "none"
        counts = [count for count in _counts(config, largest) if count > (1 if whole else gpus)]
        asked = "runtime.sharding=auto and " if config.runtime.sharding == "none" else ""
        yield ((f"{asked}{count} GPUs, sharded", estimate(with_sharding(config, "full"), count)) for count in counts)
    config = _settled(config, gpus)
    if _can_checkpoint(config):
        yield iter([("runtime.gradient_checkpointing=true", estimate(_checkpointed(config), gpus))])
    sizes = range(config.recipe.micro_batch_size - 1, 0, -1)
    smaller = [_with_micro_batch(config, size) for size in sizes if config.recipe.batch_size % (size * gpus) == 0]
    yield ((f"recipe.micro_batch_size={c.recipe.micro_batch_size}", estimate(c, gpus)) for c in smaller)


def _several_changes(config: RunConfig, largest: int) -> Iterator[tuple[str, Memory]]:
    """Yield checkpointing plus the smallest micro-batch, on as few GPUs as possible."""
    small, text = _with_micro_batch(config, 1), "recipe.micro_batch_size=1"
    if _can_checkpoint(config):
        small, text = _checkpointed(small), f"runtime.gradient_checkpointing=true and {text}"
    for gpus in _counts(small, 1 if small.not_shardable() else largest):
        yield f"{text} on {gpus} GPUs", estimate(with_sharding(small, "full" if gpus > 1 else "none"), gpus)


def _counts(config: RunConfig, largest: int) -> Iterator[int]:
    """Yield the numbers of GPUs over which the batch divides into whole micro-batches."""
    recipe = config.recipe
    parts, rest = divmod(recipe.batch_size, recipe.micro_batch_size)
    if not rest:
        yield from (gpus for gpus in range(1, min(parts, largest) + 1) if parts % gpus == 0)


def _with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return with_values(config, {"recipe.micro_batch_size": size})


def _checkpointed(config: RunConfig) -> RunConfig:
    return with_values(config, {"runtime.gradient_checkpointing": True})


def _can_checkpoint(config: RunConfig) -> bool:
    """Return whether checkpointing can be enabled. It disables the cache, which holds prefix tuning's parameters."""
    return not config.runtime.gradient_checkpointing and config.method.name != "prefix"
