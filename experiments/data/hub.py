"""Whether the Hugging Face hub can be reached: asked once per process and answered in seconds.

huggingface_hub retries each file for half a minute where there is no network, or a proxy that answers in its place. Who
is about to ask the hub for something calls `check` first: without an answer the libraries are told that they are
offline, so they take what is in their cache and fail at once otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

SECONDS = 5.0  # for the hub's answer
REFUSALS = (403, 407)  # of a proxy; the hub answers so for single files alone

_within_offline = False


def check() -> bool:
    """True if the hub answers, or if it must not be asked: by the environment (HF_HUB_OFFLINE) or by `offline`."""
    return _within_offline or answers()


@cache
def answers() -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
    except Exception:  # every HTTP client raises its own, and a proxy's are others again
        status = None
    if status is None or status >= 500 or status in REFUSALS:
        _set_offline(True)
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
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
        from datasets import config

        config.HF_HUB_OFFLINE = value
