# pyright: reportUnknownMemberType=false
"""Progress bars that become a few lines where standard error is not a terminal, as in the log of a cluster's job."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    Tqdm = tqdm[Any]
else:
    Tqdm = tqdm

SECONDS = 10.0  # at least between two lines of a log
SHARE = 0.1  # of the total between two lines,
LONGEST = 600.0  # or so many seconds
WAIT = 2.0  # seconds before a bar appears, as `delay`, of work that is short as a rule


class Bar(Tqdm):
    """tqdm's bar; in a log a line for every tenth, at most one in ten seconds and at least one in ten minutes.

    A bar that is done within ten seconds leaves nothing in a log.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.in_log = not sys.stderr.isatty()
        self.told, self.told_at = settings.get("initial", 0), time.monotonic()
        if self.in_log:
            settings |= {"mininterval": SECONDS, "miniters": 1}
        super().__init__(*args, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.in_log:
            super().display(msg, pos)
            return
        seconds, done = time.monotonic() - self.told_at, self.n - self.told
        if seconds < SECONDS or (self.total and done < SHARE * self.total and seconds < LONGEST):
            return
        self.told, self.told_at = self.n, time.monotonic()
        print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.in_log:
            self.disable = True  # so that tqdm writes no line break and no blanks
        super().close()
