import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shared.errors import UnavailableError
from shared.http_retries import retry_while_away

REQUEST = httpx.Request("POST", "https://superlink")


def answers(*outcomes: Any) -> Callable[[], Any]:
    left = iter(outcomes)

    def call() -> Any:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return call


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError(
        str(code), request=REQUEST, response=httpx.Response(code, request=REQUEST)
    )


def retry(call: Callable[[], Any], *, patience_s: float = 10.0, stopped: bool = False) -> Any:
    stop = threading.Event()
    if stopped:
        stop.set()
    return retry_while_away(
        call,
        what="the SuperLink",
        deadline=time.monotonic() + patience_s,
        stop=stop,
        rng=random.Random(1),  # noqa: S311  # spreads pauses in a test
    )


@pytest.mark.parametrize("away", [httpx.ConnectError("refused"), status(502), status(503)])
def test_a_short_absence_is_waited_out(away: Exception) -> None:
    assert retry(answers(away, away, "here")) == "here"


def test_an_answer_that_is_an_error_is_not_repeated() -> None:
    with pytest.raises(httpx.HTTPStatusError):
        retry(answers(status(401), "never asked"))


def test_an_absence_past_the_deadline_is_an_unavailable_server() -> None:
    with pytest.raises(UnavailableError, match=r"the SuperLink does not answer \(refused\)"):
        retry(answers(httpx.ConnectError("refused"), "too late"), patience_s=-1)


def test_a_server_under_another_authority_is_not_tried_again() -> None:
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    with pytest.raises(UnavailableError):
        retry(answers(error, "never asked"))


def test_being_stopped_ends_the_waiting() -> None:
    with pytest.raises(UnavailableError):
        retry(answers(httpx.ReadTimeout("slow"), "never asked"), stopped=True)
