"""Errors that a user can fix. Commands print them as one line and exit with status 1; `--debug` shows the traceback.

A stage stopped by a signal ends with `Preempted`, and its command with status 75.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

LONGEST = 500  # characters kept of another program's line
MOST_NAMES = 100  # that a hint lists


class UserError(Exception):
    """One line that says what is wrong, where, and how to fix it."""


class Diverged(UserError):
    """A training whose loss or gradients became non-finite: a failed run, which is not scored."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"diverged in step {step}: {reason}: give a smaller recipe.learning_rate")
        self.step, self.reason = step, reason


class Preempted(BaseException):
    """A signal stopped the run where it can resume. Not an Exception, so that no `except Exception` catches it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt name: the nearest known names; if none is near, all of them, or their number."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return (
        f"known: {', '.join(names)}" if len(names) <= MOST_NAMES else f"none of the {len(names)} known ones is similar"
    )


def shortened(lines: Sequence[str]) -> str:
    """Join another program's lines into one: all of up to four lines, else the first, the last and their number.

    For example, on a full disk git prints one line per file.
    """
    told = [line.strip() for line in lines if line.strip()]
    if len(told) > 4:
        told = [told[0], f"… ({len(told)} lines)", told[-1]]
    return "; ".join(line if len(line) <= LONGEST else f"{line[:LONGEST]}…" for line in told)


def check_installed(package: str, setting: str) -> None:
    """Raise a UserError if the package that a setting needs is missing."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a folder of this name, as wandb makes one, is no package
        raise UserError(f"{setting}: the package {package} is not installed: pip install {package}")


def out_of_memory(error: BaseException) -> str | None:
    """Return what was out of memory (GPU or machine, and the requested size); None for any other error.

    Only PyTorch's GPU allocator has its own class; its CPU allocator and the CUDA libraries raise a RuntimeError.
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
    return f"{where} is out of memory" + (f" ({size[1]} more were requested)" if size else "")


def one_line(error: BaseException) -> str:
    """Return the line that a command prints for the error that ended it."""
    plain = isinstance(error, UserError | OSError)
    return out_of_memory(error) or ("" if plain else f"{type(error).__name__}: ") + " ".join(str(error).split())


def _text_is_utf8() -> list[str]:
    """Return the command's arguments, and make them and the standard streams UTF-8 whatever the locale."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    return [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in sys.argv[1:]]


def prepare_imports() -> None:
    """Skip the import of sklearn and silence a notice of bitsandbytes in this process.

    If sklearn is installed, transformers imports it, and with it pandas and scipy, for a generation mode that is not
    used here: one of the six seconds of a start. On a CPU with bf16 instructions bitsandbytes warns at its import,
    which peft does, that an optional kernel is not installed.
    """
    sys.modules.setdefault("sklearn", cast(Any, None))
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command line. Exit status: 0 or the result of `main`, 1 with one line for an error, 130 if interrupted.

    75, sysexits.h's EX_TEMPFAIL, if a signal stopped it: the same command resumes.
    """
    arguments = _text_is_utf8()
    prepare_imports()
    debug = "--debug" in arguments
    try:
        status = main([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        print("interrupted: finished steps are kept, the same command resumes", file=sys.stderr)
        status = 130
    except Preempted as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # a repeated signal during exit would change the status
        what = f"{stop}, " if str(stop) else ""
        print(f"preempted: {what}the same command resumes", file=sys.stderr)
        status = 75
    except BrokenPipeError:  # the reader of our output exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except UnicodeEncodeError as error:
        if debug or sys.getfilesystemencoding() == "utf-8":
            raise
        print(
            f"error: {error.object!r:.200} cannot be a path in {error.encoding}: set LC_ALL=C.UTF-8",
            file=sys.stderr,
        )
        status = 1
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if debug or not (out_of_memory(error) or isinstance(error, UserError | OSError)):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        status = 1
    sys.exit(status)
