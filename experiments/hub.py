"""Whether the Hugging Face hub can be reached: asked once per process and answered in seconds.

huggingface_hub retries each file for half a minute where there is no network. Who is about to ask the hub for something
calls `check` first: without an answer the libraries are told that they are offline, so they take what is in their cache
and fail at once otherwise.
"""

from __future__ import annotations

import os
from functools import cache

SECONDS = 5.0  # for the hub's answer


@cache
def check() -> bool:
    """True if the hub answers, or if the environment already says that it must not be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # every HTTP client raises its own, and a proxy's are others again
        go_offline()
        return False
    return True


def go_offline() -> None:
    """What HF_HUB_OFFLINE=1 does before the libraries are imported, for those that are imported already."""
    import sys

    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        from datasets import config

        config.HF_HUB_OFFLINE = True
