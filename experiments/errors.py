"""Errors a user can mend. Command lines print one line and exit with status 1; `--debug` shows the traceback.

A stage that a signal asked to stop ends with `Preempted`, and its command with status 75.
"""

from __future__ import annotations

import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

LONGEST = 500  # characters of a line of another program


class UserError(Exception):
    """What is wrong, where, and how to mend it, in one line."""


class Diverged(UserError):
    """A training whose loss or gradients did not stay finite: a failed run, which is not scored."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"diverged in step {step}: {reason}: give a smaller recipe.learning_rate")
        self.step, self.reason = step, reason


class Preempted(BaseException):
    """A signal asked the run to stop, and it did where it can go on. No `except Exception` may hold it up."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known names, or all of them if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


def shortened(lines: Sequence[str]) -> str:
    """What another program said, in one line: all of a few lines, else the first and the last, and how many there are.

    On a full disk git has one line for every file.
    """
    told = [line.strip() for line in lines if line.strip()]
    if len(told) > 4:
        told = [told[0], f"… ({len(told)} lines)", told[-1]]
    return "; ".join(line if len(line) <= LONGEST else f"{line[:LONGEST]}…" for line in told)


def out_of_memory(error: BaseException) -> str | None:
    """What was asked for, if memory ran out: a GPU's or the machine's. None for any other error.

    PyTorch has a class for a GPU's allocator alone; its CPU allocator and the CUDA libraries raise a RuntimeError.
    """
    text = str(error)
    no_memory = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory|ALLOC_FAILED", text))
    )
    if not no_memory:
        return None
    size = re.search(r"(?i:tried|unable) to allocate (\d[\d.]*\s*\w+)", text)
    where = "the GPU" if re.search(r"CUDA|CUBLAS", text) else "the machine"
    return f"{where} is out of memory" + (f" ({size[1]} more were asked for)" if size else "")


def one_line(error: BaseException) -> str:
    """What a command prints of an error that ended it."""
    plain = isinstance(error, UserError | OSError)
    return out_of_memory(error) or ("" if plain else f"{type(error).__name__}: ") + " ".join(str(error).split())


def _text_is_utf8() -> list[str]:
    """The command's arguments. They and the standard streams are UTF-8 whatever the locale, as files are."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    return [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in sys.argv[1:]]


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command line: exit status 0 or what `main` returns, 1 with one line for a mistake, 130 when interrupted.

    75, sysexits.h's EX_TEMPFAIL, when it was asked to stop by a signal: the same command goes on from there.
    """
    arguments = _text_is_utf8()
    # When peft imports it on a CPU with bf16 instructions, bitsandbytes warns that an optional kernel is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    debug = "--debug" in arguments
    try:
        status = main([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        print("interrupted: finished steps are kept, the same command goes on from there", file=sys.stderr)
        status = 130
    except Preempted as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # repeated while the process ends, they would change its status
        what = f"{stop}, " if str(stop) else ""
        print(f"preempted: {what}the same command goes on from there", file=sys.stderr)
        status = 75
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except UnicodeEncodeError as error:
        if debug or sys.getfilesystemencoding() == "utf-8":
            raise
        print(
            f"error: {error.object!r:.200} cannot be a path, the locale has {error.encoding}: set LC_ALL=C.UTF-8",
            file=sys.stderr,
        )
        status = 1
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if debug or not (out_of_memory(error) or isinstance(error, UserError | OSError)):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        status = 1
    sys.exit(status)
