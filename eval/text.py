"""Plain text as rows of a likelihood benchmark: `evaluation.benchmarks=[…/essays.txt]`.

The text is cut at white space into windows of at most `WINDOW` characters, the same for every tokenizer. In each window
every token but the first is a target; a window begins with what the tokenizer itself puts before a text, and has no
end token, since the text continues.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.data.prompts import IGNORED, Example, leading_tokens, prompt_tokens
from experiments.data.sources import Row
from experiments.errors import UserError
from experiments.runs.evaluations import WINDOW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_rows(path: Path) -> list[Row]:
    """Return the windows of a file, in order. Concatenated, they are its text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text in UTF-8 ({error}): give the path of a text file") from None
    if not text.strip():
        raise UserError(f"{path}: holds no text: give a file that does")
    # As many characters as fit, up to the last white space; a longer word is cut.
    windows = re.findall(rf".{{1,{WINDOW}}}(?=\s|$)|.{{{WINDOW}}}", text, flags=re.DOTALL)
    return [{"instruction": "", "input": "", "output": window, "answer": ""} for window in windows]


class Windows:
    """The tokenised windows, in the form `score_examples` takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> None:
        self.leading = len(leading_tokens(tokenizer))
        self.tokens = prompt_tokens(tokenizer, [row["output"] for row in rows], bos=True)
        self.lengths = np.array([len(tokens) for tokens in self.tokens])
        self.truncated = 0
        self.unlabelled = int((self.lengths <= max(1, self.leading)).sum())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        tokens = self.tokens[index]
        return Example(tokens, [IGNORED] * self.leading + tokens[self.leading :], truncated=False)
