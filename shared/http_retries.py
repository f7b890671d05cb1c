"""Waiting out a server that is away for a moment: restarts and lost connections, nothing else."""

import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from shared.errors import UnavailableError

T = TypeVar("T")
_AWAY = frozenset({502, 503, 504})
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


def retry_while_away(
    call: Callable[[], T],
    *,
    what: str,
    deadline: float,
    stop: threading.Event,
    rng: random.Random,
) -> T:
    """Call until the server answers, with full jitter between the attempts.

    Args:
        call: must be safe to repeat.
        what: names the server in the error.
        deadline: on ``time.monotonic()``; the first attempt is made in any case.
        stop: ends the waiting at once.
        rng: draws the pauses.

    Raises:
        UnavailableError: it stayed away, or is not the server that we trust.
        httpx.HTTPStatusError: it answered with another error.
    """
    for attempt in itertools.count():
        try:
            return call()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and not _is_away(error):
                raise
            pause_s = rng.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
            hopeless = "CERTIFICATE_VERIFY_FAILED" in str(error)
            if hopeless or time.monotonic() + pause_s > deadline or stop.wait(pause_s):
                raise UnavailableError(
                    f"{what} does not answer ({error or type(error).__name__}); "
                    "check that it runs and try again"
                ) from error
    raise AssertionError("unreachable")


def _is_away(error: httpx.HTTPStatusError) -> bool:
    return error.response.status_code in _AWAY
