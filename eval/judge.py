# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""A chat model as judge of completions, in protocols with a judge. `eval/parsers.py` reads its stored words.

The judge runs through lm-eval, with its own chat template if it has one, greedily, in chunks: a stopped judging resumes
with the next chunk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.data import hub
from experiments.data.prompts import fill
from experiments.errors import UserError
from experiments.models.shapes import context_length
from experiments.runs.preemption import deferred
from experiments.runs.records import EvalPaths, file_hash, read_lines, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = dict[str, Any]
BATCH_SIZE = 16
CHUNK = 4 * BATCH_SIZE  # completions


def judge(settings: Config, paths: EvalPaths, device: str) -> None:
    """Write `judgements.jsonl`: a first line about the judge and the completions, then its words on each completion."""
    about: Config = {"judge": settings, "samples_hash": file_hash(paths.samples)}
    if paths.judgements.is_file() and next(read_lines(paths.judgements), None) == about:
        return
    _, *lines = read_lines(paths.samples)
    folder = paths.root / "judging"

    @cache
    def model() -> tuple[Any, PreTrainedTokenizerBase]:
        return _model(settings, device)

    judgements: list[Config] = []
    for number, start in enumerate(range(0, len(lines), CHUNK)):
        path = folder / f"{number:05}.jsonl"
        if not path.is_file() or next(read_lines(path), None) != about:
            lm, tokenizer = model()
            with deferred():
                words = _ask(settings, lm, tokenizer, lines[start : start + CHUNK])
                _write(path, [about, *({"words": text} for text in words)])
        judgements += list(read_lines(path))[1:]
    _write(paths.judgements, [about, *judgements])
    shutil.rmtree(folder, ignore_errors=True)


def _ask(settings: Config, lm: Any, tokenizer: PreTrainedTokenizerBase, lines: Sequence[Config]) -> list[str]:
    """Return the judge's words on each of these completions."""
    from lm_eval.api.instance import Instance

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
    return lm.generate_until(requests)


def _write(path: Path, lines: Sequence[Config]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def judged_completions(paths: EvalPaths) -> list[str]:
    """Return the judge's words, in the order of the completions."""
    hint = f"run `python -m eval.run {paths.root.parents[2]} protocol=… evaluation.judge.model=…`"
    if not paths.judgements.is_file():
        raise UserError(f"{paths.root}: its completions are not judged yet: {hint}")
    about, *judgements = read_lines(paths.judgements)
    if about["samples_hash"] != file_hash(paths.samples):
        raise UserError(f"{paths.judgements}: judges other completions than {paths.samples.name}: {hint}")
    return [judgement["words"] for judgement in judgements]


def question(settings: Config, tokenizer: PreTrainedTokenizerBase, line: Config) -> str:
    """Return the question to the judge about a completion, as a turn of its chat."""
    text = fill(settings["question"], {"instruction": line["instruction"], "completion": line["completion"]})
    if tokenizer.chat_template is None:
        return text + "\n"
    turns = [{"role": "user", "content": text}]
    turn = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(turn, str)
    return turn


def _model(settings: Config, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the judge behind lm-eval's interface. Its chat template writes its own BOS."""
    from transformers import AutoConfig, AutoTokenizer

    from eval.generate import quiet

    quiet()
    name, revision = settings["model"], settings["revision"]
    found = Path(name).is_dir() or hub.check(hub.model_file(name, revision))
    try:
        tokenizer = cast(Any, AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False))
        config = cast(Any, AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False))
        context = context_length(config)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if found else "the hub cannot be reached"
        raise UserError(f"evaluation.judge.model={name}: cannot be loaded ({reason})") from None
    bos = tokenizer.chat_template is None
    if settings["backend"] == "vllm":
        from eval.backends import vllm

        return vllm(name, tokenizer, settings["dtype"], context, bos, revision), tokenizer
    from transformers import AutoModelForCausalLM

    from eval.backends import plain_generation
    from eval.hf import Transformers

    given = {"revision": revision, "dtype": settings["dtype"], "trust_remote_code": False}
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, **given)
    model = plain_generation(loaded.to(device).eval(), tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token works
    return Transformers(model, tokenizer, BATCH_SIZE, bos), tokenizer
