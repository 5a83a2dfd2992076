"""The Hugging Face Hub.

We ask it one quick question first, because libraries retry each file for minutes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

SECONDS, AGAIN_AFTER = 5.0, 60.0
_silent_at: list[float] = []  # when the Hub last did not answer


@contextlib.contextmanager
def hub(name: str) -> Iterator[None]:
    """Wrap calls that may ask the Hub for `name`.

    If the Hub does not answer quickly, only its cache is used.
    """
    if Path(name).exists() or constants.HF_HUB_OFFLINE or answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def answers() -> bool:
    """Whether the Hub answers at all. After a failure it is asked again one minute later."""
    if _silent_at and time.monotonic() - _silent_at[0] < AGAIN_AFTER:
        return False
    _silent_at.clear()
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=SECONDS)
    # no network, no name server, a proxy that refuses: what is raised depends on the version
    except Exception:
        _silent_at.append(time.monotonic())
    return not _silent_at


def unasked() -> str | None:
    """Why the Hub is not asked at the moment; None if it is."""
    if _silent_at:
        return f"{constants.ENDPOINT} does not answer"
    return (
        "HF_HUB_OFFLINE is set, and nothing of that name is kept here"
        if constants.HF_HUB_OFFLINE
        else None
    )


def not_at_hand(name: str, file: str = "config.json") -> str | None:
    """Message for a model that is not in the cache while the Hub is not asked.

    None if that is not the reason.
    """
    why = unasked()
    if why is None or Path(name).exists():
        return None
    with contextlib.suppress(ValueError):  # no name of a repository
        if isinstance(huggingface_hub.try_to_load_from_cache(name, file), str):
            return None
    return f"no such folder, nor a model in the cache ({why})"
