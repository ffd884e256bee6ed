"""Whether the Hugging Face hub can be reached: asked once per process and repository, and answered in seconds.

huggingface_hub retries each file for half a minute where there is no network, where a proxy answers in its place, or
where the hub's pages answer but its files do not. Who is about to ask the hub for something calls `check` first:
without an answer the libraries are told that they are offline, so they take what is in their cache and fail at once
otherwise.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0  # for the hub's answer
REFUSALS = (403, 407)  # of a proxy; the hub answers so for single files alone

_within_offline = False
answered: dict[str, bool] = {}  # by file, "" for the hub itself


def check(file: str = "") -> bool:
    """True if the hub answers, or if it must not be asked: by the environment (HF_HUB_OFFLINE) or by `offline`.

    Args:
        file: also one that is about to be loaded, as `model_file` and `data_file` name it.
    """
    from huggingface_hub import constants

    if _within_offline:
        return True
    for path in ("", file):  # the first also tells a proxy that refuses from a file that is not for everyone
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
    """Whether the hub answers within so many seconds. That it has no such file, or not for us, is an answer."""
    from huggingface_hub import constants, get_session, get_token

    url = f"{constants.ENDPOINT}/{file}" if file else constants.ENDPOINT
    headers = {"Authorization": f"Bearer {token}"} if file and (token := get_token()) else {}
    try:
        status = within(seconds, lambda: get_session().head(url, headers=headers, timeout=seconds).status_code)
    except Exception:  # every HTTP client raises its own, and a proxy's are others again
        return False
    return status < 500 and (bool(file) or status not in REFUSALS)


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns or raises, or TimeoutError. A client's time limits leave out the name server's, and begin
    again with every redirection."""
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
    """Take what is in the libraries' cache and ask nobody, as whoever only plans does."""
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
    """What HF_HUB_OFFLINE does before the libraries are imported, for those that are imported already."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = str(int(value))
    constants.HF_HUB_OFFLINE = value
    if "datasets" in sys.modules:
        from datasets import config  # pyright: ignore[reportMissingTypeStubs]

        config.HF_HUB_OFFLINE = value
