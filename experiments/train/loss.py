"""The loss of a language model without the logits of all its positions at once.

In float32 the logits of 32 rows of 512 tokens over a vocabulary of 49,152 take 3 GB, and their gradient as much again.
Only labelled positions have a loss, so only they go through the output layer, in chunks. A chunk's gradients are
computed along with its loss, as in linkedin/Liger-Kernel's fused linear cross entropy (which needs a GPU): no logits
are kept, and none are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from experiments.data.prompts import IGNORED

LOGITS = 2**25  # logits in memory at a time: 128 MiB in float32

Head = Callable[[Tensor], Tensor]


class Targets:
    """The labelled positions of a batch: their hidden states and target tokens.

    Args:
        hidden: `(rows, tokens, features)`, input of the output layer, or logits if `head` is the identity. Virtual
            tokens that prompt methods put first are left out.
        labels: `(rows, tokens)`, IGNORED where there is no target.
        head: the output layer, from `(1, n, features)` to `(1, n, vocabulary)`.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, head: Head, vocabulary: int) -> None:
        tokens = labels[:, 1:]
        self.row, column = (tokens != IGNORED).nonzero(as_tuple=True)
        self.tokens, self.rows, self.head = tokens[self.row, column], labels.shape[0], head
        place = self.row * hidden.shape[1] + column + hidden.shape[1] - labels.shape[1]
        self.hidden = hidden.flatten(0, 1).index_select(0, place)
        self.chunk = max(1, LOGITS // vocabulary)

    def loss(self, divisor: Tensor | float) -> Tensor:
        """Return the negative log-likelihood summed over the targets, over `divisor`. 0 without targets."""
        parameters = [tensor for tensor in _parameters(self.head) if tensor.requires_grad]
        return ChunkedLoss.apply(self.hidden, self.tokens, divisor, self.head, self.chunk, *parameters)  # pyright: ignore

    def row_scores(self) -> Tensor:
        """Per row: summed target NLL, target count, whether every target is the argmax. `(rows, 3)` in float64."""
        scores = torch.zeros(self.rows, 3, dtype=torch.float64, device=self.tokens.device)
        with torch.no_grad():
            for part, tokens, row in zip(
                *(torch.split(x, self.chunk) for x in (self.hidden, self.tokens, self.row)), strict=True
            ):
                logits = _logits(self.head, part)
                losses = functional.cross_entropy(logits, tokens, reduction="none").double()
                wrong = (logits.argmax(-1) != tokens).double()
                scores.index_add_(0, row, torch.stack([losses, torch.ones_like(losses), wrong], dim=1))
        scores[:, 2] = (scores[:, 2] == 0).double()
        return scores


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, divisor: Any, head: Head, chunk: int, *parameters: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        needed = ctx.needs_input_grad[0] or bool(parameters)
        gradients = [torch.zeros_like(hidden)] if needed else []
        for parameter in parameters:  # if sharded, it may be bf16; its gradient is a sum over chunks
            wide = torch.promote_types(parameter.dtype, torch.float32)
            gradients.append(torch.zeros_like(parameter, dtype=wide))
        for start in range(0, len(tokens), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                logits = _logits(head, part)
                loss = functional.cross_entropy(logits, tokens[start : start + chunk], reduction="sum") / divisor
            del logits
            total += loss.detach()
            if needed:
                own, *others = torch.autograd.grad(loss, [part, *parameters])
                gradients[0][start : start + chunk] = own
                for gradient, other in zip(gradients[1:], others, strict=True):
                    gradient += other
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        own, *others = (gradient * outputs[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return own, None, None, None, None, *others


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """Return `(n, vocabulary)` logits, at least in float32, as in transformers' own loss."""
    # FSDP2's hooks would treat this as a separate forward pass. The layer is gathered since the model's own pass.
    call = cast(nn.Module, head).forward if isinstance(head, FSDPModule) else head
    logits = call(hidden.unsqueeze(0)).squeeze(0)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _parameters(head: Head) -> Iterator[Tensor]:
    return head.parameters() if isinstance(head, nn.Module) else iter(())


class TargetForward:
    """Forward passes of a model that return the `Targets` of a batch instead of its logits.

    Args:
        model: a causal language model, with or without an adapter.
    """

    def __init__(self, model: Any) -> None:
        self.head = model.get_output_embeddings()
        self.vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        self.is_plain = self.head is not None and self._logits_are_the_heads(model)

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Targets:
        """Run the model on a batch with `labels`. `model` may be `__init__`'s model in a wrapper such as DDP."""
        labels = batch["labels"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if not self.is_plain:
            return Targets(model(**inputs).logits, labels, _unchanged, self.vocabulary)
        with self._collected() as hidden:
            model(**inputs)
        return Targets(hidden[0], labels, self.head, self.vocabulary)

    @contextmanager
    def _collected(self) -> Generator[list[Tensor], None, None]:
        """Capture the input of the output layer, and pass it an empty one."""
        hidden: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden.append(inputs[0])
            return (inputs[0][:, :0],)

        handle = self.head.register_forward_pre_hook(keep)
        try:
            yield hidden
        finally:
            handle.remove()

    @torch.no_grad()
    def _logits_are_the_heads(self, model: Any) -> bool:
        """Return whether logits equal the output layer's outputs: some models scale or cap them (Gemma 2)."""
        was_training = model.training
        model.eval()
        try:
            ids = torch.arange(4, device=model.device).unsqueeze(0)
            logits = model(input_ids=ids).logits
            with self._collected() as hidden:
                model(input_ids=ids)
            return torch.equal(self.head(hidden[0]).to(logits.dtype), logits)
        finally:
            model.train(was_training)


def _unchanged(logits: Tensor) -> Tensor:
    return logits
