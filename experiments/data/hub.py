"""Checks whether the Hugging Face hub is reachable: once per process and repository, within seconds.

huggingface_hub retries each file for half a minute without a network, if a proxy answers instead, or if the hub's pages
answer but its files do not. Call `check` before loading from the hub: if it does not answer, the libraries are set
offline, so they use their cache and otherwise fail at once.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0  # time limit for the hub's answer
REFUSALS = (403, 407)  # of a proxy; the hub answers these only for single files

_within_offline = False
answered: dict[str, bool] = {}  # by file; "" is the hub itself


def check(file: str = "") -> bool:
    """Return True if the hub answers, or must not be asked: by the environment (HF_HUB_OFFLINE) or by `offline`.

    Args:
        file: a file about to be loaded, which must answer too, named as by `model_file` and `data_file`.
    """
    from huggingface_hub import constants

    if _within_offline:
        return True
    for path in ("", file):  # the first distinguishes a proxy that refuses from a file with restricted access
        if False not in answered.values() and path not in answered and not constants.HF_HUB_OFFLINE:
            answered[path] = reached(path)
            if not answered[path]:
                _set_offline(True)
    return False not in answered.values()


def model_file(name: str, revision: str | None) -> str:
    return f"{name}/resolve/{revision or 'main'}/config.json"


def data_file(name: str, revision: str) -> str:
    return f"datasets/{name}/resolve/{revision}/README.md"


def reached(file: str = "", seconds: float = SECONDS) -> bool:
    """Return whether the hub answers within `seconds`. "No such file" and "no access" are answers too."""
    from huggingface_hub import constants, get_session, get_token

    url = f"{constants.ENDPOINT}/{file}" if file else constants.ENDPOINT
    headers = {"Authorization": f"Bearer {token}"} if file and (token := get_token()) else {}
    try:
        status = within(seconds, lambda: get_session().head(url, headers=headers, timeout=seconds).status_code)
    except Exception:  # each HTTP client raises its own exceptions, and proxies cause others
        return False
    return status < 500 and (bool(file) or status not in REFUSALS)


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Return or raise what `ask` does, or raise TimeoutError. A client's own time limits exclude name resolution and
    restart with every redirection."""
    answer = queue.SimpleQueue[tuple[bool, Any]]()

    def work() -> None:
        try:
            answer.put((True, ask()))
        except BaseException as error:
            answer.put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answered, value = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if not answered:
        raise value
    return value


@contextmanager
def offline() -> Generator[None, None, None]:
    """Use only the libraries' cache and ask no server, e.g. while planning."""
    from huggingface_hub import constants

    global _within_offline
    before = _within_offline, constants.HF_HUB_OFFLINE
    _within_offline = True
    _set_offline(True)
    try:
        yield
    finally:
        _within_offline = before[0]
        _set_offline(before[1])


def _set_offline(value: bool) -> None:
    """Do what HF_HUB_OFFLINE does before the libraries are imported, for those already imported."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = str(int(value))
    constants.HF_HUB_OFFLINE = value
    if "datasets" in sys.modules:
        from datasets import config  # pyright: ignore[reportMissingTypeStubs]

        config.HF_HUB_OFFLINE = value
