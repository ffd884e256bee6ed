"""Cached tokens equal the output of `encode` despite interrupted writes; batches of rows of similar length."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from experiments.config import Data, Protocol
from experiments.data import prompts
from experiments.data.rows import load_rows
from experiments.data.tokens import tokenised
from experiments.plan.compose import plan
from experiments.runs.records import read_json
from experiments.speed import tokens as token_benchmark
from experiments.speed.tokens import padding, trained_tokenizer
from experiments.train.sampler import EpochSampler

Rows = list[dict[str, str]]
Fails = Callable[[Callable[[], object]], str]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Return three batches of rows, the last one incomplete."""
    return load_rows(Data("arith", train=600, heldout=14, test=28, seed=0), "train", None)


@pytest.fixture(scope="module")
def tokenizer(rows: Rows) -> PreTrainedTokenizerBase:
    return trained_tokenizer(rows)


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return plan(["task=arith"])[0].protocol


def folders(cache: Path) -> list[Path]:
    """Return all folders in the cache, including unfinished ones."""
    return sorted((cache / "tokens").iterdir())


class Killed(BaseException):
    """Simulates the death of the process: no code may catch it."""


@pytest.mark.parametrize("train_on_prompt", [True, False])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("max_length", [256, 24])
def test_tokens_equal_encode(
    train_on_prompt: bool,
    joined: bool,
    max_length: int,
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
) -> None:
    protocol = replace(protocol, train_on_prompt=train_on_prompt, joined=joined, max_length=max_length)
    expected = prompts.encode(protocol, tokenizer, rows)
    examples = tokenised(protocol, tokenizer, rows, tmp_path)
    assert len(examples) == 600
    assert [examples[index] for index in range(600)] == expected
    assert examples[-1] == expected[-1]
    assert examples.lengths.tolist() == [len(example.input_ids) for example in expected]
    assert examples.truncated == sum(example.truncated for example in expected)
    assert (examples.truncated > 0) == (max_length == 24)


def test_a_second_call_tokenises_nothing(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = tokenised(protocol, tokenizer, rows, tmp_path)
    (folder,) = folders(tmp_path)
    assert len(folder.name) == 16
    assert {path.name for path in folder.iterdir()} == {"tokens.arrow", "manifest.json"}
    tokenizer("a caller that pads and cuts", padding="max_length", truncation=True, max_length=4)
    monkeypatch.setattr(prompts, "encode", None)
    before = pa.total_allocated_bytes()
    second = tokenised(protocol, tokenizer, rows, tmp_path)
    # The tokens, four bytes each, stay on disk; the lengths, four bytes per row, do not.
    assert pa.total_allocated_bytes() - before < second.lengths.sum() < (folder / "tokens.arrow").stat().st_size / 4
    assert second[300] == first[300]
    assert folders(tmp_path) == [folder]


def test_whatever_decides_the_tokens_gets_its_own_folder(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = rows[:20]
    last_changed = [*few[:-1], {**few[-1], "output": few[-1]["output"] + "."}]
    tokenised(protocol, tokenizer, few, tmp_path)
    tokenised(replace(protocol, max_length=255), tokenizer, few, tmp_path)
    tokenised(protocol, trained_tokenizer(rows[:20]), few, tmp_path)
    tokenised(protocol, tokenizer, last_changed, tmp_path)
    tokenised(protocol, tokenizer, few[::-1], tmp_path)
    edited = tmp_path / "prompts.py"
    edited.write_text(f"{Path(prompts.__file__).read_text(encoding='utf-8')}\n", encoding="utf-8")
    monkeypatch.setattr(prompts, "__file__", str(edited))
    tokenised(protocol, tokenizer, few, tmp_path)
    assert len(folders(tmp_path)) == 6


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=repr)
def test_an_interrupted_write_leaves_nothing(
    error: BaseException,
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, calls = prompts.encode, []

    def stopping(*arguments: Any) -> list[prompts.Example]:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "encode", stopping)
        with pytest.raises(type(error)):
            tokenised(protocol, tokenizer, rows, tmp_path)
    assert folders(tmp_path) == []
    assert tokenised(protocol, tokenizer, rows, tmp_path)[599] == encode(protocol, tokenizer, rows[599:])[0]


def test_what_a_killed_process_wrote_is_not_read(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = prompts.encode
    child = os.fork()
    if child == 0:  # dies in the second batch, without a chance to clean up
        prompts.encode = lambda *arguments: encode(*arguments) if arguments[2][0] == rows[0] else os._exit(9)
        tokenised(protocol, tokenizer, rows, tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (unfinished,) = folders(tmp_path)
    assert unfinished.name.startswith(".making-")
    assert [example.input_ids for example in tokenised(protocol, tokenizer, rows, tmp_path)] == [
        example.input_ids for example in encode(protocol, tokenizer, rows)
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink, lambda path: path.write_text("[]", encoding="utf-8")])
@pytest.mark.parametrize("name", ["tokens.arrow", "manifest.json"])
def test_a_damaged_folder_is_made_again(
    name: str,
    damage: Callable[[Path], object],
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
) -> None:
    few = rows[:20]
    tokenised(protocol, tokenizer, few, tmp_path)
    (folder,) = folders(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    examples = tokenised(protocol, tokenizer, few, tmp_path)
    assert [examples[index] for index in range(20)] == prompts.encode(protocol, tokenizer, few)
    assert folders(tmp_path) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_processes_may_make_the_same_folder(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, others = prompts.encode, []

    def overtaken(*arguments: Any) -> list[prompts.Example]:
        if not others:  # another process starts later and finishes first
            others.append(None)
            others[0] = tokenised(protocol, tokenizer, rows, tmp_path)
        return encode(*arguments)

    monkeypatch.setattr(prompts, "encode", overtaken)
    examples = tokenised(protocol, tokenizer, rows, tmp_path)
    assert len(folders(tmp_path)) == 1
    assert examples[599] == others[0][599] == encode(protocol, tokenizer, rows[599:])[0]


def test_no_rows_are_no_examples(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    examples = tokenised(protocol, tokenizer, [], tmp_path)
    assert (len(examples), len(examples.lengths), examples.truncated) == (0, 0, 0)


def test_what_cannot_be_tokenised_is_refused(
    protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Rows, tmp_path: Path, fails_with: Fails
) -> None:
    bad = [*rows[:300], {"instruction": "a row without its target"}]
    assert "its target needs the field 'output'" in fails_with(lambda: tokenised(protocol, tokenizer, bad, tmp_path))
    assert folders(tmp_path) == []
    message = "ByT5Tokenizer tokenises in Python only: choose a model whose tokenizer has a tokenizer.json"
    assert message in fails_with(lambda: tokenised(protocol, ByT5Tokenizer(), rows, tmp_path))


# The order of the rows


def sampler(
    lengths: Any, batch_size: int, micro_batch_size: int, *, grouped: bool, seed: int = 0, epoch: int = 0
) -> EpochSampler:
    return EpochSampler(
        lengths,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        seed=seed,
        epoch=lambda: epoch,
        group_by_length=grouped,
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Draw row lengths (up to several windows), a batch size, and a micro-batch size that divides it."""
    micro = draw(st.sampled_from([1, 2, 4]))
    lengths = draw(st.lists(st.integers(1, 300), max_size=20)) * draw(st.integers(1, 40))
    return lengths, micro * draw(st.integers(1, 3)), micro


@given(batches(), st.integers(0, 3), st.integers(0, 3))
def test_grouping_keeps_an_epochs_rows(case: tuple[list[int], int, int], seed: int, epoch: int) -> None:
    lengths, batch, micro = case
    plain = list(sampler(lengths, batch, micro, grouped=False, seed=seed, epoch=epoch))
    grouped_sampler = sampler(lengths, batch, micro, grouped=True, seed=seed, epoch=epoch)
    grouped = list(grouped_sampler)
    assert len(grouped) == len(grouped_sampler) == len(lengths) // batch * batch
    assert sorted(grouped) == sorted(plain)
    assert len(set(grouped)) == len(grouped)
    assert list(grouped_sampler) == grouped

    def padded(order: list[int]) -> int:
        return sum(max(lengths[row] for row in order[at : at + micro]) for at in range(0, len(order), micro))

    assert padded(grouped) <= padded(plain)  # sorting never pads more


def test_without_grouping_the_order_is_a_plain_permutation() -> None:
    lengths = [5] * 11
    # torch.randperm(11) of the seed 1,000,003 · seed + epoch, without its last three rows.
    assert list(sampler(lengths, 4, 2, grouped=False)) == [10, 0, 4, 3, 5, 8, 2, 1]
    assert list(sampler(lengths, 4, 4, grouped=False, seed=2, epoch=5)) == [3, 8, 5, 7, 2, 10, 1, 9]


def test_epochs_and_seeds_have_their_own_order() -> None:
    lengths = torch.randint(10, 200, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    orders = {
        (seed, epoch): tuple(sampler(lengths, 8, 4, grouped=True, seed=seed, epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_a_micro_batch_has_one_length_and_steps_have_several() -> None:
    lengths = np.repeat([10, 20, 30, 40], 16)
    order = np.array(list(sampler(lengths, 16, 4, grouped=True)))
    micro_batches = lengths[order].reshape(16, 4)
    assert (micro_batches == micro_batches[:, :1]).all()
    steps = micro_batches[:, 0].reshape(4, 4)
    assert all(len(set(step)) > 1 for step in steps.tolist())
    assert padding(lengths, 4, group_by_length=True) == 0
    assert padding(lengths, 4, group_by_length=False) > 0.1


def test_padding_is_what_its_definition_says() -> None:
    # Micro-batches of 16 rows with one long row: 15 · 1 + 9 tokens of 16 · 9.
    assert padding(np.array([1] * 15 + [9]), 16, group_by_length=True) == pytest.approx(1 - 24 / 144)


def test_two_processes_share_whole_micro_batches() -> None:
    """As in accelerate: micro-batches are assigned to processes in turn, so that a step has the same rows."""
    lengths = list(range(1, 38))
    micro_batches = list(BatchSampler(sampler(lengths, 8, 2, grouped=True), 2, drop_last=False))
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler(lengths, 8, 2, grouped=True), 2, drop_last=False), 2, process))
        for process in (0, 1)
    ]
    assert len(micro_batches) == 16
    assert [batch for pair in zip(*shards, strict=True) for batch in pair] == micro_batches


# Real rows


def test_commonsense_batches_are_hardly_padded(data_root: Path, tmp_path: Path) -> None:
    (config,) = plan(["task=commonsense_74k", "recipe.learning_rate=0"])
    rows = load_rows(config.task.data, "train", str(data_root))[::10]
    lengths = tokenised(config.protocol, trained_tokenizer(rows), rows, tmp_path).lengths
    for micro in (4, 16):
        assert padding(lengths, micro, group_by_length=True) < 0.05 < padding(lengths, micro, group_by_length=False)


@pytest.mark.slow
def test_the_benchmark_writes_what_it_prints(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_benchmark, "VOCABULARY", 400)
    token_benchmark.main(["--rows", "320", "--data-root", str(data_root), "--out", str(tmp_path / "tokens.json")])
    figures = read_json(tmp_path / "tokens.json")
    assert figures["rows"] == figures["different_rows"] == 320
    assert set(figures["protocols"]) == {"diablo", "llm_adapters"}
    printed = capsys.readouterr().out
    for name, entry in figures["protocols"].items():
        assert entry["rows"] == 320
        assert entry["rows_per_second"] == pytest.approx(320 / entry["seconds"])
        assert f"| {name} | 16 | {entry['padding']['16']['shuffled']:.1%} |" in printed
    assert figures["environment"]["device"]


def test_the_benchmark_needs_a_batch(fails_with: Fails) -> None:
    assert "--rows 3: give at least 16, one batch" in fails_with(lambda: token_benchmark.main(["--rows", "3"]))
