# pyright: reportUnknownMemberType=false
"""The base model `tiny`: a Llama and its tokenizer, trained from scratch in about a minute and cached by content.

It learns sums and simple stories from `experiments.data.arith.corpus`, so that fine-tuning it resembles fine-tuning a
real base model: it has the skills, but not the task's phrasing and answer format.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.config import Model
from experiments.data import arith
from experiments.data.prompts import Example, collate
from experiments.models.shapes import build_config
from experiments.progress import Bar
from experiments.runs.records import content_hash, file_hash

if TYPE_CHECKING:
    pass

PAD, BOS, EOS = 0, 1, 2
TOKENIZER_DOCUMENTS = 4000


def make_base(model: Model, cache: Path) -> Path:
    """Return the folder of the base model that a `model` config describes; trained first if it is not in the cache.

    The folder's name is the hash of everything that determines the weights: the config, this file and the corpus's.
    """
    sources = {path.name: file_hash(path) for path in (Path(__file__), Path(arith.__file__))}
    decides = {key: asdict(model)[key] for key in ("architecture", "pretraining", "dtype")}
    folder = cache / "base" / f"{model.name}-{content_hash([decides, sources])[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        try:
            _pretrain(model, aside)
            for path in aside.iterdir():
                path.chmod(0o644)  # safetensors writes 0600 whatever the umask
            aside.chmod(0o755)
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same model first
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def make_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the corpus. Numbers up to 99 and calculator marks are one token; any text is encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}|=<<|>>|####"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]  # ids 0, 1 and 2
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(arith.corpus(seed), TOKENIZER_DOCUMENTS), trainer)
    # Callers that request special tokens, e.g. lm-eval, get the BOS.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.padding_side = "left"
    return fast


def _pretrain(model: Model, folder: Path) -> None:
    """Train the model and write it. A plain loop: one minute, one schedule, nothing to resume or sweep."""
    settings = model.pretraining
    assert settings is not None
    steps = settings.steps
    tokenizer = make_tokenizer(model.architecture["vocab_size"], settings.seed)
    config = build_config(model.architecture)
    with torch.random.fork_rng():  # the caller's random state must not depend on whether the model was cached
        torch.manual_seed(settings.seed)
        network = cast(Any, AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        warmup = min(100, steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        documents = arith.corpus(settings.seed)
        for _ in Bar(range(steps), desc=f"making the base model {model.name}", unit="step", mininterval=1.0):
            rows = [
                [BOS, *tokenizer.encode(document, add_special_tokens=False), EOS]
                for document in itertools.islice(documents, settings.batch_size)
            ]
            batch = collate([Example(row, row, truncated=False) for row in rows], PAD)
            network(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
