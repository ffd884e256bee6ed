"""A chat model that reads completions, of protocols that have one. Its words are kept; `eval/parsers.py` reads them.

The judge is asked through lm-eval, behind its own chat template if it has one, greedily.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError
from experiments.records import EvalPaths, content_hash, read_lines, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = dict[str, Any]
BATCH_SIZE = 16


def judge(settings: Config, paths: EvalPaths, device: str, progress: bool) -> None:
    """Write `judgements.jsonl`: what the model of `settings` says of every completion, all at once."""
    if paths.judgements.is_file():
        return
    if settings["model"] is None:
        raise UserError("this protocol needs a chat model to read completions: name one with evaluation.judge.model=…")
    from lm_eval.api.instance import Instance

    from eval.generate import quiet

    _, *lines = read_lines(paths.samples)
    lm, tokenizer = _model(settings, device)
    requests = [
        Instance(
            request_type="generate_until",
            doc=line,
            arguments=(
                question(settings, tokenizer, line),
                {"until": [], "max_gen_toks": settings["max_new_tokens"], "do_sample": False},
            ),
            idx=number,
        )
        for number, line in enumerate(lines)
    ]
    with quiet(progress):
        words = lm.generate_until(requests)
    judgements = [
        {"index": line["index"], "words": said, "judge": content_hash(settings)}
        for line, said in zip(lines, words, strict=True)
    ]
    write_atomically(paths.judgements, "".join(json.dumps(judgement) + "\n" for judgement in judgements))


def question(settings: Config, tokenizer: PreTrainedTokenizerBase, line: Config) -> str:
    """What the judge is asked about a completion, as a turn of its chat."""
    text = settings["question"].format(instruction=line["instruction"], completion=line["completion"])
    if tokenizer.chat_template is None:
        return text + "\n"
    turns = [{"role": "user", "content": text}]
    turn = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(turn, str)
    return turn


def _model(settings: Config, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The judge behind lm-eval's interface. Its chat template writes its own BOS."""
    from transformers import AutoConfig, AutoTokenizer

    name, revision = settings["model"], settings["revision"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        context = AutoConfig.from_pretrained(name, revision=revision).max_position_embeddings
    except OSError as error:
        raise UserError(f"evaluation.judge.model={name}: cannot be loaded ({str(error).splitlines()[0]})") from None
    bos = tokenizer.chat_template is None
    if settings["backend"] == "vllm":
        from eval.models import vllm

        return vllm(name, settings["dtype"], context, bos, revision), tokenizer
    if settings["backend"] != "hf":
        raise UserError(f"evaluation.judge.backend={settings['backend']}: choose hf or vllm")
    from lm_eval.models.huggingface import HFLM

    harness: Any = HFLM
    return (
        harness(
            pretrained=name,
            revision=revision or "main",
            dtype=settings["dtype"],
            device=device,
            batch_size=BATCH_SIZE,
            add_bos_token=bos,
        ),
        tokenizer,
    )
