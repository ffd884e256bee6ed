"""Likelihood benchmarks: the NLL of given targets against its definition, from rows to scores."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from eval.backends import load
from eval.benchmarks import planned as planned_benchmarks
from eval.benchmarks import read_benchmark, rows_of
from eval.likelihood import score_examples, score_likelihood
from eval.rescore import main as rescore_main
from eval.rescore import rescore
from eval.run import check_data, describe, evaluate
from eval.text import text_rows
from experiments.config import Data, Protocol
from experiments.data.prompts import IGNORED, encode
from experiments.data.rows import load_rows
from experiments.data.tokens import tokenised
from experiments.plan.compose import options, plan
from experiments.reproduce.run import outcome
from experiments.runs.config_files import read_config
from experiments.runs.evaluations import TASKS, evaluation_paths, protocol_section
from experiments.runs.records import EvalPaths, EvalRecord, RunPaths, read_json, read_lines, read_record, trained_record
from experiments.settings import section, with_values
from experiments.train import loss as chunked
from experiments.train.run import train
from tests.conftest import SMALL, planned
from tests.real_runs import keep_shortest_rows, settings

Fails = Callable[[Callable[[], object]], str]
NLL = "evaluation.benchmarks=[arith_nll]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> RunPaths:
    """Return a DiaBlo run with a learning rate high enough that the adapter changes the NLL."""
    folder = tmp_path_factory.mktemp("likelihood")
    where = [f"runtime.runs_dir={folder}", f"runtime.cache_dir={cache_dir}"]
    found = planned([*SMALL, "method=diablo", "recipe.learning_rate=0.01", *where])
    train(found)
    return found


def scored(run: RunPaths, **evaluation: Any) -> Any:
    config = with_values(read_config(run), {f"evaluation.{key}": value for key, value in evaluation.items()})
    return load(config, run, trained_record(run), allow_identity=False)


def definition(model: Any, protocol: Protocol, tokenizer: Any, row: dict[str, str]) -> tuple[float, int, bool]:
    """Return one row's NLL, target count and whether every target is the argmax, by a float64 log-softmax."""
    (example,) = encode(protocol, tokenizer, [row])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    log_softmax = logits.double().log_softmax(-1)
    places = [place for place, label in enumerate(example.labels) if place and label != IGNORED]
    nll = -sum(float(log_softmax[place - 1, example.labels[place]]) for place in places)
    exact = all(int(logits[place - 1].argmax()) == example.labels[place] for place in places)
    return nll, len(places), exact


def samples_of(run: RunPaths, benchmark: str = "arith_nll") -> list[dict[str, Any]]:
    (paths,) = [paths for paths in run.evaluations() if read_json(paths.plan)["benchmark"] == benchmark]
    return list(read_lines(paths.samples))[1:]


@pytest.fixture
def copied(run: RunPaths, tmp_path: Path) -> RunPaths:
    return RunPaths(Path(shutil.copytree(run.root, tmp_path / run.root.name, ignore=shutil.ignore_patterns("eval"))))


def test_a_rows_nll_is_the_definition_in_float64(copied: RunPaths) -> None:
    (record,) = evaluate(copied, [NLL])
    config, found = read_config(copied), scored(copied)
    rows = rows_of(config, read_benchmark("arith_nll"))
    lines = samples_of(copied)
    assert [line["index"] for line in lines] == list(range(28))
    expected = [definition(found.model.double(), config.protocol, found.tokenizer, row) for row in rows]
    for line, (nll, targets, exact) in zip(lines, expected, strict=True):
        assert line["nll"] == pytest.approx(nll, rel=1e-5)
        assert (line["targets"], line["exact"]) == (targets, int(exact))
    total, targets = (sum(column) for column in list(zip(*expected, strict=True))[:2])
    assert record.accuracy == pytest.approx(total / targets, rel=1e-5)
    assert record.accuracy == pytest.approx(fmean(record.items), rel=1e-12)
    for item, (nll, _, _) in zip(record.items, expected, strict=True):
        assert item == pytest.approx(nll * 28 / targets, rel=1e-5)
    assert record.extra_metrics == {"exact": fmean(int(exact) for *_, exact in expected), "targets": float(targets)}
    assert (record.metric, record.n, record.protocol, record.dtype) == ("nll", 28, "plain", "float32")
    assert (record.samples, record.dropped, record.cut_prompts, record.identity) == (1, 0, 0, False)


def test_the_scores_of_held_out_rows_are_those_of_training(run: RunPaths) -> None:
    """Training scored the same rows and tokens by its own code: unmerged, in micro-batches."""
    config = read_config(run)
    rows = load_rows(config.task.data, "heldout", None)
    found = scored(run)
    examples = tokenised(config.protocol, found.tokenizer, rows, Path(config.runtime.cache_dir))
    nll, targets, exact = score_examples(found, examples, 5).T.tolist()
    before = read_json(run.held_out)
    assert nll == pytest.approx(before["nll"], rel=1e-5)
    assert (targets, exact) == (before["targets"], before["exact"])
    record = trained_record(run)
    assert record.held_out is not None
    assert sum(nll) / sum(targets) == pytest.approx(record.held_out["loss"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_neither_batch_nor_merging_nor_chunks_matter(
    batch_size: int, copied: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(copied, [NLL, "evaluation.limit=9", "evaluation.batch_size=9"])
    whole = samples_of(copied)
    shutil.rmtree(copied.root / "eval")
    monkeypatch.setattr(chunked, "LOGITS", 1000)
    evaluate(copied, [NLL, "evaluation.limit=9", f"evaluation.batch_size={batch_size}", "evaluation.merge=false"])
    found = samples_of(copied)
    assert len({line["targets"] for line in found}) > 1  # some rows are padded
    assert [line["nll"] for line in found] == pytest.approx([line["nll"] for line in whole], rel=1e-5)
    assert [line["targets"] for line in found] == [line["targets"] for line in whole]


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_so_are_the_later_ones(copied: RunPaths) -> None:
    config, found = read_config(copied), scored(copied)
    rows = rows_of(config, read_benchmark("arith_nll"))[:14]
    examples = tokenised(config.protocol, found.tokenizer, rows, Path(config.runtime.cache_dir))
    whole = score_examples(found, examples, 14)
    sizes: list[int] = []

    def check(module: Any, inputs: tuple[Any, ...]) -> None:
        sizes.append(len(inputs[0]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError(f"{sizes[-1]} rows")

    hook = found.model.get_input_embeddings().register_forward_pre_hook(check)
    most = 3
    torch.testing.assert_close(score_examples(found, examples, 14), whole)
    assert sizes[2:] == [14, 7, 3, 3, 3, 3, 2]  # after the passes that look at how the model makes its logits
    hook.remove()


def test_the_error_is_the_spread_over_resampled_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, 60, (400,), generator=generator)
    nll = targets * (0.5 + 0.2 * torch.randn(400, generator=generator, dtype=torch.float64).abs())
    lines = [{"nll": float(a), "targets": int(b), "exact": 0} for a, b in zip(nll, targets, strict=True)]
    items, _, _, error = score_likelihood(lines)
    picked = torch.randint(400, (4000, 400), generator=generator)
    means = nll[picked].sum(1) / targets[picked].sum(1)
    assert error == pytest.approx(float(means.std()), rel=0.05)
    assert fmean(items) == pytest.approx(float(nll.sum() / targets.sum()))


def test_a_row_without_targets_counts_nothing() -> None:
    lines = [{"nll": 3.0, "targets": 2, "exact": 1}, {"nll": 0.0, "targets": 0, "exact": 1}]
    items, extra_metrics, counts, _ = score_likelihood(lines)
    assert (fmean(items), extra_metrics, counts["unparsed"]) == (1.5, {"exact": 0.5, "targets": 2.0}, 1)


def test_the_base_run_is_what_training_started_from(small: list[str], copied: RunPaths) -> None:
    base = planned([*small, "method=base", NLL])
    train(base)
    (before,), (after,) = evaluate(base), evaluate(copied, [NLL])
    assert before.identity
    assert before.data_hash == after.data_hash
    assert after.accuracy < before.accuracy  # training helped
    found, config = scored(base), read_config(base)
    row = rows_of(config, read_benchmark("arith_nll"))[3]
    nll, *_ = definition(found.model.double(), config.protocol, found.tokenizer, row)
    assert samples_of(base)[3]["nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix", "full", "ia3"])
def test_methods_that_are_loaded_otherwise(name: str, small: list[str]) -> None:
    """Prompt methods prepend virtual tokens; the scores equal those of training on the held-out rows."""
    run = planned([*small, f"method={name}", NLL])
    train(run)
    (record,) = evaluate(run)
    config, found = read_config(run), scored(run)
    rows = load_rows(config.task.data, "heldout", None)
    examples = tokenised(config.protocol, found.tokenizer, rows, Path(config.runtime.cache_dir))
    assert score_examples(found, examples, 4)[:, 0].tolist() == pytest.approx(read_json(run.held_out)["nll"], rel=1e-5)
    assert record.n == 28


def test_only_the_answer_is_a_target(small: list[str]) -> None:
    """Also if the training loss includes the prompt: else two such runs would be compared on different tokens."""
    found: list[tuple[EvalRecord, EvalPaths]] = []
    for on_prompt in ("false", "true"):
        run = planned([*small, "method=base", NLL, f"protocol.train_on_prompt={on_prompt}"])
        train(run)
        ((record,), (paths,)) = evaluate(run), run.evaluations()
        found.append((record, paths))
        config, model = read_config(run), scored(run)
        protocol = replace(config.protocol, train_on_prompt=False)
        examples = encode(protocol, model.tokenizer, rows_of(config, read_benchmark("arith_nll")))
        expected = sum(len(one.labels) - one.labels.count(IGNORED) for one in examples)
        assert record.extra_metrics["targets"] == expected
    (masked, here), (unmasked, there) = found
    assert masked.items == unmasked.items  # one model, and the same tokens
    assert here.root.name == there.root.name


def test_rescoring_needs_no_model_and_a_finished_score_is_left(
    copied: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = evaluate(copied, [NLL])
    (paths,) = copied.evaluations()
    before, told = paths.score.read_bytes(), paths.samples.stat().st_mtime_ns
    assert evaluate(copied, [NLL]) == [record]
    assert paths.samples.stat().st_mtime_ns == told
    shutil.rmtree(copied.adapter)
    ((old, new),) = rescore(copied)
    assert old == new == read_record(paths.score, EvalRecord)
    assert paths.score.read_bytes() == before
    paths.score.write_text(
        json.dumps(read_json(paths.score) | {"items": [1.0] * 28, "accuracy": 1.0}), encoding="utf-8"
    )
    rescore_main([str(copied.root)])
    assert f"nll {record.accuracy:.4f}, was 1.0000" in capsys.readouterr().out
    paths.samples.write_text(
        "".join(paths.samples.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8"
    )
    paths.score.unlink()
    with pytest.raises(Exception, match="does not have the completions of its plan"):
        rescore(copied)


def test_it_stands_beside_generation_and_is_never_a_percentage(copied: RunPaths) -> None:
    names = "evaluation.benchmarks=[arith,arith_nll]"
    both = evaluate(copied, [names, "evaluation.limit={number: 4, likelihood: null}"])
    assert [(record.benchmark, record.n) for record in both] == [("arith", 4), ("arith_nll", 28)]
    nll = both[1].accuracy
    assert describe(both[1]).startswith(f"arith_nll (plain, likelihood): nll {nll:.4f} ± {both[1].standard_error:.4f}")
    assert outcome(trained_record(copied), both).endswith(f"arith_nll nll {nll:.4f}")


def test_nothing_of_generation_is_asked_for(copied: RunPaths) -> None:
    """Parsers and generation settings do not apply: changing them changes no evaluation, and none is required."""
    others = ["evaluation.parser={}", "evaluation.backend=vllm", "evaluation.generation.num_beams=4"]
    (first,), (second,) = evaluate(copied, [NLL]), evaluate(copied, [NLL, *others])
    assert first == second
    assert len(copied.evaluations()) == 1
    config = with_values(read_config(copied), {"evaluation.benchmarks": ["arith_nll"]})
    (paths,) = evaluation_paths(copied, config)
    assert paths.score.is_file()


@pytest.mark.parametrize("name", options("protocol"))
def test_a_named_protocol_is_the_section_of_a_run_planned_with_it(name: str) -> None:
    tasks = {"arith": "arith", "code": "code_alpaca", "commonsense": "commonsense_170k", "gsm8k": "gsm8k"}
    tasks |= {"math_10k": "math_10k", "metamathqa": "metamathqa", "safety": "saferpaca"}
    family, _, own = name.partition("/")
    (config,) = plan([f"task={tasks[family]}", f"protocol={own}", "recipe.learning_rate=1"])
    assert protocol_section(name) == config.mapping["protocol"]
    assert section(Protocol, protocol_section(name)) == config.protocol


def test_a_task_files_protocol_makes_the_tokens(copied: RunPaths, data_root: Path) -> None:
    names = ["arc_easy_nll", "alpaca_nll", "code_alpaca_nll", "gsm8k_nll"]
    settings = [f"evaluation.benchmarks=[{','.join(names)}]", f"runtime.data_root={data_root}", "evaluation.limit=3"]
    records = evaluate(copied, settings)
    assert [(record.protocol, record.n) for record in records] == [
        ("diablo", 3),
        ("lori", 3),
        ("lori", 3),
        ("plain", 3),
    ]
    found = scored(copied)
    rows = load_rows(Data("arc_easy"), "test", str(data_root))
    for line, row in zip(samples_of(copied, "arc_easy_nll"), rows, strict=False):
        protocol = section(Protocol, protocol_section("commonsense/diablo"))
        nll, targets, exact = definition(found.model.double(), protocol, found.tokenizer, row)
        assert line["nll"] == pytest.approx(nll, rel=1e-5)
        assert (line["targets"], line["exact"]) == (targets, int(exact))


def test_the_retention_sets_are_500_rows_each_that_training_never_sees(data_root: Path) -> None:
    names = [path.stem for path in TASKS.glob("*_nll.yaml") if "limit" in read_benchmark(path.stem).task["metadata"]]
    assert sorted(names) == ["alpaca_nll", "arc_easy_nll", "code_alpaca_nll", "math_nll"]
    choice = [f"evaluation.benchmarks=[{','.join(names)}]", f"runtime.data_root={data_root}"]
    (config,) = plan(["task=gsm8k_mawps", "method=base", "recipe.learning_rate=1", *choice])
    check_data(config)
    trained = {row["instruction"] for row in load_rows(config.task.data, "train", str(data_root))}
    for benchmark, asked in planned_benchmarks(config):
        assert asked["asked"]["limit"] == 500
        rows = rows_of(config, benchmark)[:500]
        assert len({json.dumps(row) for row in rows}) == 500
        assert not {row["instruction"] for row in rows} & trained


def test_windows_joined_are_the_text(tmp_path: Path) -> None:
    file = tmp_path / "essay.txt"
    text = "one  two\n\nthree\t" * 400 + "x" * 4500 + " end\n"
    file.write_text(text, encoding="utf-8")
    windows = [row["output"] for row in text_rows(file)]
    assert "".join(windows) == text
    assert max(map(len, windows)) == 1000
    cut_in_words = [before[-1] + after[0] for before, after in itertools.pairwise(windows) if after[0].strip()]
    assert cut_in_words == ["xx"] * 4
    assert len(windows) <= 14


def test_any_text_is_a_benchmark(copied: RunPaths, tmp_path: Path, fails_with: Fails) -> None:
    """The NLL of a window covers all tokens but the first, by definition."""
    file = tmp_path / "essay.txt"
    generator = torch.Generator().manual_seed(0)
    words = ["Tom", "has", "3", "apples", "naïve\n\n", "\t12", "buys"]
    text = " ".join(words[int(i)] for i in torch.randint(len(words), (900,), generator=generator))
    file.write_text(text, encoding="utf-8")
    name = f"evaluation.benchmarks=[{file}]"
    config = with_values(read_config(copied), {"evaluation.benchmarks": [str(file)]})
    rows = rows_of(config, read_benchmark(str(file)))
    found = scored(copied)
    ids = [found.tokenizer(row["output"]).input_ids for row in rows]
    assert max(map(len, ids)) <= found.context
    (record,) = evaluate(copied, [name])
    (paths,) = evaluation_paths(copied, config)
    assert read_record(paths.score, EvalRecord) == record
    assert (record.benchmark, record.protocol, record.n) == ("essay.txt", "text", len(rows))
    model = found.model.double()
    for line, tokens in zip(samples_of(copied, "essay.txt"), ids, strict=True):
        with torch.no_grad():
            log_softmax = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        nll = -sum(float(log_softmax[place - 1, tokens[place]]) for place in range(1, len(tokens)))
        assert line["nll"] == pytest.approx(nll, rel=1e-5)
        assert line["targets"] == len(tokens) - 1
    file.unlink()
    ((old, new),) = rescore(copied)
    assert old == new
    assert "cannot be read as text" in fails_with(lambda: evaluate(copied, [name, "evaluation.limit=1"]))
    file.write_text(" ", encoding="utf-8")
    assert "holds no text" in fails_with(lambda: evaluate(copied, [name, "evaluation.limit=1"]))
    twice = f"evaluation.benchmarks=[{file},other/essay.txt]"
    assert "two are called essay.txt" in fails_with(lambda: evaluate(copied, [twice]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.limit=0", "evaluation.limit=0: it must be a whole number of at least 1"),
        ("evaluation.limit={number: 3}", "for which evaluation.limit has no value"),
        ("evaluation.benchmarks=[arith_nl]", "did you mean arith_nll"),
    ],
)
def test_bad_settings_are_told(override: str, message: str, copied: RunPaths, fails_with: Fails) -> None:
    assert message in fails_with(lambda: evaluate(copied, [NLL, override]))
    assert not copied.evaluations()


def test_rows_that_do_not_fit_are_refused(small: list[str], fails_with: Fails) -> None:
    cut = planned([*small, "method=base", NLL, "protocol.max_length=4"])
    train(cut)
    assert fails_with(lambda: evaluate(cut)) == "arith_nll: no row has a target: protocol plain cuts them all off"
    short = planned([*small, "method=base", NLL, "model.architecture.max_position_embeddings=8"])
    train(short)
    assert "tokens, and the model takes 8: choose a benchmark" in fails_with(lambda: evaluate(short))
    assert not list(short.root.glob("eval/*/*/s*.json*"))


@pytest.mark.real
@pytest.mark.parametrize("method", ["diablo", "base"])
def test_on_real_weights(
    method: str, smollm2_slice: list[str], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_shortest_rows(monkeypatch)
    rate = ["recipe.learning_rate=3e-3", "recipe.max_steps=2"] if method == "diablo" else []
    names = ["gsm8k_nll", "arc_easy_nll", "math_nll"]
    choice = [f"method={method}", *rate, f"evaluation.benchmarks=[{','.join(names)}]"]
    run = planned([*smollm2_slice, *settings(tmp_path, data_root), *choice])
    train(run)
    records = evaluate(run)
    config, found = read_config(run), scored(run)
    names = ("commonsense/diablo", "metamathqa/diablo")
    sections = [config.protocol, *(section(Protocol, protocol_section(name)) for name in names)]
    for record, protocol in zip(records, sections, strict=True):
        rows = rows_of(config, read_benchmark(record.benchmark))
        assert record.n == 4
        for line, row in zip(samples_of(run, record.benchmark), rows, strict=False):
            nll, targets, exact = definition(found.model, protocol, found.tokenizer, row)
            assert line["nll"] == pytest.approx(nll, rel=1e-4)
            assert (line["targets"], line["exact"]) == (targets, int(exact))
