"""Tokenised training rows: computed once, cached, and memory-mapped from the cache.

`<cache>/tokens/<16 hex>/` contains `tokens.arrow` (an Arrow IPC file, one record per row) and `manifest.json` (that
file's hash). The folder's name is the hash of everything that determines the tokens; it is written under a temporary
name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow  # pyright: ignore[reportMissingTypeStubs]
from pyarrow import compute  # pyright: ignore[reportMissingTypeStubs]
from torch.utils.data import Dataset

from experiments.config import Protocol
from experiments.data import prompts
from experiments.data.prompts import IGNORED, Example
from experiments.data.rows import rows_hash
from experiments.data.sources import Row
from experiments.errors import UserError
from experiments.runs.records import content_hash, file_hash, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

pa, pc = cast(Any, pyarrow), cast(Any, compute)  # which have no annotations
TOKENS, MANIFEST = "tokens.arrow", "manifest.json"
BATCH = 256  # rows tokenised at once by all of the tokenizer's threads; larger batches are not faster
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("ignored", pa.int32()),  # number of leading labels that are IGNORED; the others equal the tokens
        ("truncated", pa.bool_()),
    ]
)


class Examples(Dataset[Example]):
    """Training examples in a memory-mapped Arrow file.

    `lengths` are in tokens; `truncated` is the number of cut rows, `unlabelled` that of rows with no token in the loss.
    """

    def __init__(self, path: Path) -> None:
        # The operating system loads the parts that are read, and drops them when memory is short.
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.lengths: np.ndarray = pc.call_function("list_value_length", [self.table["input_ids"]]).to_numpy()
        self.truncated = int(self.table["truncated"].to_numpy().sum())
        ignored = self.table["ignored"].to_numpy().clip(min=1)  # the first token is never predicted
        self.unlabelled = int((ignored >= self.lengths).sum())

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Example:
        tokens = self.table["input_ids"][index].values.to_numpy().tolist()
        ignored = self.table["ignored"][index].as_py()
        return Example(tokens, [IGNORED] * ignored + tokens[ignored:], self.table["truncated"][index].as_py())


def tokenised(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], cache: Path) -> Examples:
    """Return `prompts.encode` of all rows, from the cache; computed and cached first if necessary."""
    folder = cache / "tokens" / _key(protocol, tokenizer, rows)
    if not _whole(folder):
        _make(protocol, tokenizer, rows, folder)
    return Examples(folder / TOKENS)


def _key(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> str:
    """Return 16 hex digits of the hash of what determines the tokens: protocol, tokenizer, rows and code."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} tokenises in Python only: choose a model whose tokenizer has a "
            f"tokenizer.json, or convert it to one"
        )
    content = _tokenizer_hash(cast(Any, tokenizer).backend_tokenizer.to_str())
    return content_hash(
        [
            asdict(protocol),
            [type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id, content],
            rows_hash(list(rows)),
            [file_hash(Path(path)) for path in (prompts.__file__, __file__)],
            version("tokenizers"),
        ]
    )[:16]


@lru_cache(maxsize=4)
def _tokenizer_hash(text: str) -> str:
    """Return the hash of a tokenizer's JSON; cached, because parsing 49,000 entries takes a third of a second."""
    content = json.loads(text)
    for key in ("truncation", "padding"):  # set by each call, so they reflect only the last caller
        del content[key]
    return content_hash(content)


def _make(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _write(protocol, tokenizer, rows, aside / TOKENS)
        write_atomically(aside / MANIFEST, json.dumps({"sha256": file_hash(aside / TOKENS)}))
        aside.chmod(0o755)
        if not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    except OSError:
        if not _whole(folder):  # else another process wrote the same folder first
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], path: Path) -> None:
    """Write record batches one by one, so that only a few rows' tokens are in memory."""
    from experiments.progress import Bar  # with torch, which reading tokens does not need

    bar = Bar(total=len(rows), desc="tokenising", unit="row", leave=False, mininterval=1.0, delay=2)
    with bar, pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for start in range(0, len(rows), BATCH):
            examples = prompts.encode(protocol, tokenizer, rows[start : start + BATCH])
            columns = [
                [example.input_ids for example in examples],
                [example.labels.count(IGNORED) for example in examples],
                [example.truncated for example in examples],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            bar.update(len(examples))


def _whole(folder: Path) -> bool:
    """Return whether the folder is intact. Hashing a file in the page cache takes a second per gigabyte."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"] == file_hash(folder / TOKENS)
    except (OSError, ValueError, KeyError, TypeError):
        return False
