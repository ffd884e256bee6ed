"""Rewrites a trained adapter of blocks as an ordinary LoRA adapter, for servers that load LoRA only.

Diagonal blocks share no input and no output, so the singular values of the update D are those of all its blocks
together. Keeping the R largest of them, whichever block they belong to, is the best approximation of D of rank R
(Eckart and Young), and it is exact where D has no more than R nonzero ones. A block contributes at most as many as its
shorter side has features.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.constants import REPOCARD_NAME
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from diablo.authors import OURS, PREFIX, check_new, empty_model, read_config, read_tensors
from diablo.blocks.config import DIABLO, DiabloConfig
from diablo.blocks.layer import layer_sides
from diablo.blocks.positions import Positions, delta_weight
from diablo.blocks.products import covered
from diablo.card import PAPER, save_card

REPORT = "conversion.json"
INPUTS, OUTPUTS = ".diablo_inputs", ".diablo_outputs"
KEPT = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "auto_mapping")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class Part(NamedTuple):
    """Blocks of one shape that share no feature: their values `(n, d_in, d_out)` and their features."""

    values: Tensor
    inputs: Tensor  # (n, d_in)
    outputs: Tensor  # (n, d_out)


class Factors(NamedTuple):
    """`B @ A` approximates the update in the layout of `nn.Linear.weight`. Errors are squared Frobenius norms."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    error: float
    norm: float


@dataclass(frozen=True)
class Conversion:
    """What a conversion made, as `conversion.json` in the new folder says. Errors are |D - B A| / |D|, Frobenius."""

    method: str
    dtype: str
    error: float  # of all layers together
    ranks: dict[str, int]
    errors: dict[str, float]


def to_lora(
    adapter: Path, out: Path, rank: int | None = None, dtype: torch.dtype = torch.float32, base: str | None = None
) -> Conversion:
    """Write the adapter in the folder `adapter` as LoRA into the new folder `out`.

    Args:
        rank: largest rank of a layer; None keeps every nonzero singular value, which is exact up to `dtype`.
        base: hub id or folder of the base model, of which only the config is read; the blocks must fit it. Blocks that
            do not tell the sides of their layers, uneven ones and those off the diagonal, need it where the adapter
            does not name it.

    Raises:
        ValueError: the folder has no adapter of blocks, its base is needed and missing, or a value is not finite.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    check_new(out)
    config, tensors = read_config(adapter), read_tensors(adapter)
    names = [key.removeprefix(PREFIX).removesuffix(OURS) for key in tensors if key.endswith(OURS)]
    if not names:
        raise ValueError(f"{adapter}: an adapter of type {config['peft_type']} without blocks: nothing to convert")
    for name in names:
        _check_blocks(adapter, config, name, tensors)
    sides = _sides(adapter, config, tensors, names, base)
    converted: dict[str, Tensor] = {}
    made: dict[str, Factors] = {}
    for name in names:
        key = f"{PREFIX}{name}"
        positions = None
        if f"{key}{INPUTS}" in tensors:
            positions = Positions(tensors.pop(f"{key}{INPUTS}"), tensors.pop(f"{key}{OUTPUTS}"))
        blocks = tensors.pop(f"{key}{OURS}")
        if not blocks.isfinite().all():
            raise ValueError(f"{adapter}: {name} has values that are NaN or infinite: the training failed")
        made[name] = factors(parts(blocks, positions, *sides[name]), *sides[name], rank, dtype)
        converted[f"{key}.lora_A.weight"], converted[f"{key}.lora_B.weight"] = made[name].A, made[name].B
    ranks = {name: len(factor.A) for name, factor in made.items()}
    squares = [(factor.error, factor.norm) for factor in made.values()]
    conversion = Conversion(
        method=config["peft_type"],
        dtype=str(dtype).removeprefix("torch."),
        error=_relative(sum(error for error, _ in squares), sum(norm for _, norm in squares)),
        ranks=ranks,
        errors={name: _relative(factor.error, factor.norm) for name, factor in made.items()},
    )
    _lora_config(config, ranks).save_pretrained(str(out))
    save_file({**converted, **tensors}, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    tags, text = {"lora", config["peft_type"].lower()}, _card_text(config, conversion, rank)
    save_card(out / REPOCARD_NAME, config.get("base_model_name_or_path"), tags, {}, text)
    (out / REPORT).write_text(json.dumps(asdict(conversion), indent=1) + "\n", encoding="utf-8")
    return conversion


def parts(blocks: Tensor, positions: Positions | None, in_features: int, out_features: int) -> list[Part]:
    """Return an update as blocks that share no input and no output; one dense block where its blocks do."""
    if positions is None:
        found, done = [], 0
        for values in covered(blocks, in_features, out_features):  # in an uneven split, the last block is cut
            n, rows, columns = values.shape
            first = torch.arange(done, done + n)[:, None]
            found.append(
                Part(
                    values,
                    first * blocks.shape[1] + torch.arange(rows),
                    first * blocks.shape[2] + torch.arange(columns),
                )
            )
            done += n
        return found
    if all(len(index.unique()) == index.numel() for index in positions):
        return [Part(blocks, positions.inputs.long(), positions.outputs.long())]
    inputs, outputs = (index.unique().long() for index in positions)
    dense = delta_weight(blocks, Positions(*(index.long() for index in positions)), in_features, out_features)
    return [Part(dense.T[inputs][:, outputs][None], inputs[None], outputs[None])]


def factors(
    found: Sequence[Part], in_features: int, out_features: int, rank: int | None, dtype: torch.dtype
) -> Factors:
    """Return the best factors of an update of rank `rank` at most, by falling singular values, rounded to `dtype`.

    The singular values are computed in float64 and shared equally between A and B. The error includes the rounding.
    """
    triplets = [torch.linalg.svd(part.values.double(), full_matrices=False) for part in found]
    values = torch.cat([s.flatten() for _, s, _ in triplets])
    noise = values.max() * max(in_features, out_features) * torch.finfo(torch.float64).eps
    keep = min(int((values > noise).sum()), rank or len(values))
    order = values.argsort(descending=True, stable=True)[: max(keep, 1)]  # LoRA has no rank 0
    a = torch.zeros(len(order), in_features, dtype=dtype)
    b = torch.zeros(out_features, len(order), dtype=dtype)
    error = norm = 0.0
    start = 0
    for part, (u, s, vh) in zip(found, triplets, strict=True):
        mine = (order >= start) & (order < start + s.numel())
        rows, block, triplet = mine.nonzero().flatten(), *_divmod(order[mine] - start, s.shape[1])
        chosen = torch.zeros_like(s)
        chosen[block, triplet] = s[block, triplet].sqrt()
        left, right = (u * chosen[:, None, :]).to(dtype), (vh * chosen[:, :, None]).to(dtype)
        a[rows[:, None], part.inputs[block]] = left[block, :, triplet]
        b.T[rows[:, None], part.outputs[block]] = right[block, triplet]
        exact = part.values.double()
        error += float((exact - left.double() @ right.double()).square().sum())
        norm += float(exact.square().sum())
        start += s.numel()
    return Factors(a, b, error, norm)


def _divmod(index: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return index // by, index % by


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0


def _check_blocks(adapter: Path, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> None:
    """Raise a ValueError if a layer's tensors do not have the shapes that the adapter's config says."""
    key = f"{PREFIX}{name}"
    blocks, index = tensors[f"{key}{OURS}"], [tensors.get(f"{key}{part}") for part in (INPUTS, OUTPUTS)]
    where, shape = f"{adapter}: {name}: blocks of shape {tuple(blocks.shape)}", tuple(blocks.shape)
    if blocks.ndim != 3 or not blocks.is_floating_point():
        raise ValueError(f"{where} and {blocks.dtype}: they must be three-dimensional floating-point numbers")
    given = [None if part is None else tuple(part.shape) for part in index]
    if given not in ([None, None], [shape[:2], shape[::2]]):
        raise ValueError(f"{where} with positions of shapes {given[0]} and {given[1]}: they do not belong together")
    if config["peft_type"] == DIABLO and not config.get("allow_uneven"):
        try:
            asked = DiabloConfig(num_blocks=config.get("num_blocks", len(blocks))).blocks_of(name)
        except ValueError as error:
            raise ValueError(f"{adapter / CONFIG_NAME}: {name}: {error}") from None
        if asked != len(blocks):
            raise ValueError(f"{where}: {CONFIG_NAME} says num_blocks={asked}: they are not of one adapter")
    if config["peft_type"] == "SMT" and set(shape[1:]) != {config.get("block_size")}:
        raise ValueError(f"{where}: {CONFIG_NAME} says block_size={config.get('block_size')}: not of one adapter")


def _check_sides(adapter: Path, name: str, shape: torch.Size, sides: tuple[int, int], base: str) -> None:
    n, d_in, d_out = shape
    if (n * d_in, n * d_out) != sides:
        raise ValueError(
            f"{adapter}: {name}: {n} blocks of {d_in} × {d_out} do not cover the layer {sides[0]} × {sides[1]} of "
            f"{base}: it is not the base model it was trained on"
        )


def _sides(
    adapter: Path, config: dict[str, Any], tensors: dict[str, Tensor], names: list[str], base: str | None
) -> dict[str, tuple[int, int]]:
    """Return each layer's number of inputs and outputs, from its blocks or else from the base model's config."""
    whole = not config.get("allow_uneven") and not any(key.endswith(INPUTS) for key in tensors)
    shapes = {name: tensors[f"{PREFIX}{name}{OURS}"].shape for name in names}
    if whole and base is None:
        return {name: (n * d_in, n * d_out) for name, (n, d_in, d_out) in shapes.items()}
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter}: the blocks do not tell the sides of their layers: name the base model (--base)")
    model = empty_model(base)
    try:
        sides = {name: layer_sides(model.get_submodule(name)) for name in names}
    except AttributeError as error:
        raise ValueError(f"{adapter}: {base} is not the base model it was trained on: {error}") from None
    for name in names if whole else ():
        _check_sides(adapter, name, shapes[name], sides[name], base)
    return sides


def _lora_config(config: dict[str, Any], ranks: dict[str, int]) -> LoraConfig:
    """Return the config with `lora_alpha` equal to the rank everywhere, so that the scaling is 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    by_target: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        by_target.setdefault(name.rpartition(".")[2], set()).add(rank)
    pattern: dict[str, int] = {}
    for name, rank in ranks.items():
        target = name.rpartition(".")[2]
        if rank != usual:
            pattern[target if len(by_target[target]) == 1 else name] = rank
    # In other methods than DiaBlo, a layer that the targets match may have no blocks.
    same = config["peft_type"] == "DIABLO" and config.get("target_modules")
    targets = {name: config.get(name) for name in TARGETS} if same else {"target_modules": sorted(ranks)}
    settings: dict[str, Any] = {name: config.get(name) for name in KEPT} | targets
    settings |= {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return LoraConfig(inference_mode=True, **settings)


def _card_text(config: dict[str, Any], done: Conversion, rank: int | None) -> str:
    shown = {name: config[name] for name in ("num_blocks", "pattern", "density") if config.get(name) is not None}
    size = ", ".join(f"{name}={value}" for name, value in shown.items())
    ranks, worst = done.ranks.values(), max(done.errors, key=lambda name: done.errors[name])
    exact = "the exact update" if rank is None else f"the best approximation of rank {rank} of the update"
    return f"""# LoRA adapter converted from {done.method}

An ordinary LoRA adapter: {exact} of a {done.method} adapter ({size}; {PAPER}).
`python -m diablo.to_lora` converted it; it loads in PEFT without the package `diablo`. What was trained is the
{done.method} adapter, not LoRA.

Error |D - B A| / |D| in the Frobenius norm, with factors in {done.dtype}: {done.error:.2e} over all {len(ranks)}
layers, {done.errors[worst]:.2e} in the worst ({worst}).
Ranks: {min(ranks)} to {max(ranks)}. `{REPORT}` lists both by layer.
"""
