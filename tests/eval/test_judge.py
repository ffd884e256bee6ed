"""A judge model reads completions: the real code path, with the tiny model, unable to judge, as judge."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval import judge as judge_module
from eval.judge import question
from eval.rescore import rescore
from eval.run import evaluate
from experiments.errors import Preempted
from experiments.models.tiny import make_base, make_tokenizer
from experiments.plan.compose import plan
from experiments.runs.records import EvalPaths, RunPaths, file_hash, read_lines
from experiments.train.run import train
from tests.analysis.analysis_runs import change
from tests.conftest import planned

Fails = Callable[[Callable[[], object]], str]


@pytest.fixture
def run(data_root: Path, tmp_path: Path, cache_dir: Path) -> RunPaths:
    arguments = [
        *("task=safety_7k", "method=base", "model.pretraining.steps=4", "runtime.device=cpu", "evaluation.limit=4"),
        *("evaluation.benchmarks=[advbench]", "evaluation.full_batches_of=null"),
        *("evaluation.generation.max_new_tokens=8", f"runtime.data_root={data_root}"),
        *(f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.cache_dir={cache_dir}"),
    ]
    base = planned(arguments)
    train(base)
    return base


def judged_by(cache_dir: Path) -> list[str]:
    (config,) = plan(["task=safety_7k", "method=base", "model.pretraining.steps=4"])
    judge = make_base(config.model, cache_dir)
    return [
        *("protocol=lori_judge", f"evaluation.judge.model={judge}", "evaluation.judge.dtype=float32"),
        "evaluation.generation.max_new_tokens=8",
    ]


def evaluation_by(run: RunPaths, protocol: str) -> EvalPaths:
    (paths,) = (paths for paths in run.evaluations() if paths.root.name.rpartition("-")[0] == protocol)
    return paths


def test_a_judge_reads_the_completions_that_keywords_read(run: RunPaths, cache_dir: Path) -> None:
    """The judge's replies are stored and decide alone, and rescoring does not run the judge."""
    (by_keywords,) = evaluate(run)
    (by_judge,) = evaluate(run, judged_by(cache_dir))
    assert (by_keywords.parser, by_judge.parser) == ("refusal_keywords", "judged")
    assert by_keywords.metric == by_judge.metric == "safety rate"
    paths = evaluation_by(run, "lori_judge")
    assert paths.samples.read_text(encoding="utf-8") == evaluation_by(run, "lori").samples.read_text(
        encoding="utf-8"
    )  # not generated twice
    about, *judgements = read_lines(paths.judgements)
    assert len(judgements) == 4
    assert by_judge.judge == about["judge"]
    lines = [about, *({"words": words} for words in ("No.", "yes, in part", "NO", "perhaps"))]
    paths.judgements.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    change(paths.score, judgements_hash=file_hash(paths.judgements))
    again = next(after for _, after in rescore(run) if after.protocol == "lori_judge")
    assert again.items == [1, 0, 1, 0]
    assert again.unparsed == 1


def test_a_judging_that_was_stopped_goes_on_with_the_next_chunk(
    run: RunPaths, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_module, "CHUNK", 1)
    arguments = judged_by(cache_dir)
    evaluate(run, arguments)
    paths = evaluation_by(run, "lori_judge")
    undisturbed = paths.judgements.read_bytes()
    paths.judgements.unlink()
    paths.score.unlink()
    write, written = judge_module._write, []

    def stopped_at_the_second(path: Path, lines: list[dict[str, Any]]) -> None:
        write(path, lines)
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(judge_module, "_write", stopped_at_the_second)
    with pytest.raises(Preempted, match="eval stopped by SIGTERM"):
        evaluate(run, arguments)
    assert not paths.judgements.exists()
    evaluate(run, arguments)
    assert written == ["00000.jsonl", "00001.jsonl", "00002.jsonl", "00003.jsonl", "judgements.jsonl"]
    assert paths.judgements.read_bytes() == undisturbed
    assert not (paths.root / "judging").exists()


def test_words_about_other_completions_do_not_count(run: RunPaths, cache_dir: Path, fails_with: Fails) -> None:
    """New completions are judged again; rescoring alone refuses the old replies."""
    evaluate(run, judged_by(cache_dir))
    paths = evaluation_by(run, "lori_judge")
    header, *lines = paths.samples.read_text(encoding="utf-8").splitlines()
    paths.samples.write_text(
        "\n".join([header, lines[0].replace('"completion": "', '"completion": "x'), *lines[1:]]) + "\n",
        encoding="utf-8",
    )
    assert "not the completions that score.json was made from" in fails_with(lambda: rescore(run))
    change(paths.score, samples_hash=file_hash(paths.samples))
    assert "judges other completions" in fails_with(lambda: rescore(run))
    paths.score.unlink()
    (record,) = evaluate(run, judged_by(cache_dir))
    assert record.samples_hash == next(read_lines(paths.judgements))["samples_hash"]


def test_a_protocol_with_a_judge_needs_one(run: RunPaths, fails_with: Fails) -> None:
    assert "set it with evaluation.judge.model=" in fails_with(lambda: evaluate(run, ["protocol=lori_judge"]))


def test_a_judge_that_cannot_be_loaded_is_named(run: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    missing = ["protocol=lori_judge", f"evaluation.judge.model={tmp_path / 'none'}"]
    assert f"evaluation.judge.model={tmp_path / 'none'}" in fails_with(lambda: evaluate(run, missing))


def test_the_question_is_a_turn_of_the_judges_own_chat() -> None:
    settings = {"question": "Asked: {instruction}. Said: {completion}. Did it comply?"}
    line = {"instruction": "Q {x}", "completion": "A"}
    tokenizer: Any = make_tokenizer(300, seed=0)
    assert question(settings, tokenizer, line) == "Asked: Q {x}. Said: A. Did it comply?\n"
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"
    )
    asked = question(settings, tokenizer, line)
    assert asked == "<user>Asked: Q {x}. Said: A. Did it comply?<assistant>"
