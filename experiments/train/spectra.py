# pyright: reportUnknownMemberType=false
"""Measures how close a training run is to the condition under which diagonal blocks reach the optimum of all of W.

In a layer Y = X W the gradient of W vanishes with the gradients of its diagonal blocks if every block X_i of the input
has the column space of X, or every block of the output's gradient g_Y has that of g_Y (analysis/theory.py). A run with
`spectra.every` measures this every so many optimizer steps, on tokens of the step's first micro-batch, in all trained
linear layers, and writes a line into `spectra.jsonl`:

    {"step": 21, "tokens": 512, "seconds": 0.03, "layers": {"model.layers.0.mlp.up_proj": {"X": {…}, "g_Y": {…}}, …}}

with the results of `spectrum`. `seconds` is the time of the measurement, which does not affect the training.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from experiments.config import Spectra
from experiments.errors import UserError
from experiments.runs.records import cut_lines

# Relative to X_i's largest singular value, by X's dtype: smaller directions may be rounding noise and do not count in
# X_i's column space. In Llama layers whose X or g_Y has a known rank, the first singular value that should be zero
# was at most 1.2e-7 in float32 and 1.6e-3 in bf16; rounding a trained model's X and g_Y to bf16 adds up to 2.8e-3.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DIGITS = 5  # significant digits written


def spectrum(x: Tensor, blocks: int) -> dict[str, Any]:
    """Return how a matrix and its column blocks are related.

    Args:
        x: (tokens, features), any floating dtype; computed in float64.
        blocks: N, the number of blocks into which the features are cut.

    Returns:
        `stable_rank`: ||X||_F² / ||X||_2²; `energy`: the share of ||X||_F² in the d = features / N largest singular
        directions, 1 if rank(X) ≤ d; and for every block, as lists: `block_stable_rank`, `block_energy` (the share of
        ||X_i||_F² in its d / 4 largest directions) and `covered`, the share of ||X||_F² inside the column space of X_i:
        at most `energy`, and 1 for every block if the condition holds. The column space is spanned by the left singular
        vectors of X_i whose singular value is over `TOLERANCE` of the largest.

    Raises:
        ValueError: N does not divide the features, or X has a non-finite number.
    """
    if x.shape[1] % blocks:
        raise ValueError(f"{blocks} blocks do not divide its {x.shape[1]} features")
    if not torch.isfinite(x).all():
        raise ValueError("has numbers that are not finite")
    tolerance = TOLERANCE[x.dtype]
    x = x.double()
    if x.shape[0] > x.shape[1]:
        # keeps the inner products of columns, so nothing below changes.
        x = cast(Tensor, torch.linalg.qr(x, mode="r").R)
    width = x.shape[1] // blocks
    rows = x @ x.T
    parts = x.view(x.shape[0], blocks, width).transpose(0, 1)  # (N, tokens, d)
    # Not from eigenvalues of X_i^T X_i: in float64 they lose singular values below 1e-8 of the largest.
    left, singular, _ = cast(tuple[Tensor, Tensor, Tensor], torch.linalg.svd(parts, full_matrices=False))
    left = left * (singular > tolerance * singular[:, :1])[:, None]
    covered = (left * (rows @ left)).sum((1, 2)) / rows.trace()
    squares = cast(Tensor, torch.linalg.eigvalsh(rows)).flip(-1).clamp(min=0)  # rounding makes some negative
    whole = _shares(squares, width)
    each = _shares(singular.square(), max(1, width // 4))
    return {
        **dict(zip(("stable_rank", "energy"), whole, strict=True)),
        **dict(zip(("block_stable_rank", "block_energy"), each, strict=True)),
        "covered": covered.tolist(),
    }


def _shares(squares: Tensor, count: int) -> tuple[Any, Any]:
    """From descending squared singular values (…, m): their sum over the largest, and the `count` largest's share."""
    total = squares.sum(-1)
    return cast(tuple[Any, Any], ((total / squares[..., 0]).tolist(), (squares[..., :count].sum(-1) / total).tolist()))


class MeasureSpectra(TrainerCallback):
    """Writes `path` while `model` is trained; `settings` is the config's section `spectra`."""

    def __init__(self, model: nn.Module, path: Path, settings: Spectra) -> None:
        self.model, self.path = model, path
        self.every, self.blocks, self.tokens = settings.every or 0, settings.blocks, settings.tokens
        self.layers = trained_layers(model)
        if not self.layers:
            raise UserError("spectra.every: no linear layer is trained, so there is nothing to measure: set it to null")
        self.handles: list[RemovableHandle] = []
        self.token_index = torch.empty(0, dtype=torch.long)  # of the measured tokens
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.last: tuple[Callable[[], Tensor | None], Tensor] = (lambda: None, self.token_index)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cut_lines(self.path, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.handles = [self.model.register_forward_pre_hook(self._choose_tokens, with_kwargs=True)]
            self.handles += [
                layer.register_forward_hook(partial(self._keep, name)) for name, layer in self.layers.items()
            ]

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step + 1)

    def _choose_tokens(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Choose tokens evenly over the micro-batch, without its padding."""
        found = kwargs["attention_mask"].flatten().nonzero().flatten()
        self.token_index = found[
            torch.linspace(0, len(found) - 1, min(self.tokens, len(found)), device=found.device).long()
        ]

    def _keep(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.last[0]() is not inputs[0]:  # q, k and v share their input
            self.last = weakref.ref(inputs[0]), self._rows(inputs[0])
        self.seen[name] = {"X": self.last[1]}
        if output.requires_grad:
            output.register_hook(partial(self._keep_gradient, name))

    def _keep_gradient(self, name: str, gradient: Tensor) -> None:
        self.seen[name]["g_Y"] = self._rows(gradient)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().flatten(0, -2)[self.token_index]

    def _measure(self, step: int) -> None:
        if not self.handles:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        started = time.perf_counter()
        known: dict[int, dict[str, Any]] = {}
        lines: dict[str, dict[str, Any]] = {}
        for name, sides in self.seen.items():
            for side, matrix in sides.items():
                if id(matrix) not in known:
                    try:
                        known[id(matrix)] = _rounded(spectrum(matrix, self.blocks))
                    except ValueError as error:
                        raise UserError(
                            f"spectra.blocks={self.blocks}: {side} of {name} in step {step}: {error}"
                        ) from None
                lines.setdefault(name, {})[side] = known[id(matrix)]
        self.seen = {}
        record = {"step": step, "tokens": len(self.token_index), "seconds": round(time.perf_counter() - started, 4)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "layers": lines}) + "\n")


def trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with an adapter, by their names in the base; without any, the trained linear layers."""

    def named(chosen: Callable[[str, Any], bool]) -> dict[str, nn.Module]:
        modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
        found = [(name, module) for name, module in modules if chosen(name, module)]
        return {name.removeprefix("base_model.model."): module for name, module in found}

    return named(lambda _, module: isinstance(module, BaseTunerLayer)) or named(
        lambda name, module: isinstance(module, nn.Linear) and module.weight.requires_grad and ".layers." in name
    )


def _rounded(value: dict[str, Any] | list[Any] | float) -> Any:
    """Round numbers to `DIGITS` digits; NaN (from all zeros) becomes None."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return None if value != value else float(f"{value:.{DIGITS}g}")
