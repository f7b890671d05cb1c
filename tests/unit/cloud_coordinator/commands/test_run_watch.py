"""What ``shoal run start --watch`` shows, also while the coordinator starts again."""

from collections.abc import Callable
from typing import Any

import pytest

from cloud_coordinator.commands.client import ApiClient
from cloud_coordinator.commands.runs import watch_run
from shared.errors import ShoalError, UnavailableError


class _Scripted(ApiClient):
    """Answers each GET with the next of its script; the last one for ever."""

    def __init__(self, *script: dict[str, Any] | Exception) -> None:
        self._script = list(script)

    def get(self, path: str, **query: str | None) -> Any:
        assert (path, query) == ("/v1/runs/tumour-1", {})
        step = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(step, Exception):
            raise step
        return step


AWAY = UnavailableError("no coordinator answers")


def run(state: str, *, rounds: int = 0, cause: str = "") -> dict[str, Any]:
    return {
        "run_id": "tumour-1",
        "state": state,
        "doing": "training" if state == "running" else "",
        "cause": cause,
        "model_version": "ab" * 32,
        "rounds": [record(number) for number in range(rounds)],
    }


def record(number: int) -> dict[str, Any]:
    outcomes = {"clinic-a": "replied", "clinic-b": "timed-out"}
    parts = [
        {"device_id": device, "outcome": outcome, "cause": ""}
        for device, outcome in outcomes.items()
    ]
    return {
        "round_number": number,
        "state": "committed",
        "seconds": 0.25,
        "metrics": {"loss": 0.5},
        "cause": "",
        "participations": parts,
    }


def watch(client: ApiClient, *, pause: Callable[[float], None] = lambda _: None) -> list[str]:
    said: list[str] = []
    watch_run(client, "tumour-1", say=said.append, pause=pause)
    return said


def test_the_watcher_names_the_run_its_rounds_and_what_came_of_it() -> None:
    said = watch(_Scripted(run("running", rounds=1), run("finished", rounds=2)))
    assert said == [
        "run tumour-1",
        "round   0  committed in 0.2 s  loss=0.5000  clinic-a  (clinic-b: timed-out)",
        "running: training",
        "round   1  committed in 0.2 s  loss=0.5000  clinic-a  (clinic-b: timed-out)",
        "finished: model version abababababab",
    ]


def test_a_run_that_fails_says_so_once() -> None:
    said: list[str] = []
    with pytest.raises(ShoalError, match="run tumour-1 failed: diverged"):
        watch_run(
            _Scripted(run("failed", cause="diverged")),
            "tumour-1",
            say=said.append,
            pause=lambda _: None,
        )
    assert said == ["run tumour-1"]


def test_a_coordinator_that_starts_again_does_not_end_the_view() -> None:
    said = watch(_Scripted(run("running"), AWAY, AWAY, run("finished")))
    assert said == [
        "run tumour-1",
        "running: training",
        "no coordinator answers; waiting for it, Ctrl-C ends only this view",
        "finished: model version abababababab",
    ]


def test_a_coordinator_that_stays_away_ends_the_view() -> None:
    waited: list[float] = []
    with pytest.raises(UnavailableError):
        watch(_Scripted(AWAY), pause=waited.append)
    assert 60 < sum(waited) < 600
