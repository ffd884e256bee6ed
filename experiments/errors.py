"""Errors a user can mend. Command lines print one line and exit with status 1; `--debug` shows the traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """What is wrong, where, and how to mend it, in one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known names, or all of them if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command line: exit status 0 or what `main` returns, 1 with one line for a mistake, 130 when interrupted."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        status = main([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        print("interrupted: finished steps are kept, the same command goes on from there", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 1
    sys.exit(status)
