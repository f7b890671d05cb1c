"""What ``shoal stats`` prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from cloud_coordinator.commands import runs, statistics
from cloud_coordinator.commands.statistics import (
    list_statistics,
    show_statistics,
    start_statistics,
)
from shared.errors import ConfigError

GROUP = {"group": 0, "roster": 7, "survivors": 6, "corrupted": 1, "threshold": 4, "cause": ""}
COUNT: dict[str, Any] = {
    "kind": "count",
    "feature": "",
    "values": {"count": 1234567.0},
    "standard_error": {},
}
VARIANCE: dict[str, Any] = {
    "kind": "variance",
    "feature": "heat",
    "values": {"mean": 20.04321, "standard_deviation": 3.2},
    "standard_error": {"mean": 0.51234},
}
PLAN = 'name = "ages"\n[task]\nname = "pumps"\nuses = "tabular"\n'


def record(number: int, *answers: dict[str, Any], **secrecy: Any) -> dict[str, Any]:
    known = {"groups": [GROUP], "noise": "none", "epsilon": None, "delta": None}
    return {
        "round_number": number,
        "state": "committed" if answers else "abandoned",
        "seconds": 1.5,
        "metrics": {},
        "cause": "",
        "participations": [],
        "answers": list(answers),
        "secrecy": {**known, **secrecy},
    }


def a_run(*rounds: dict[str, Any], purpose: str = "statistics", state: str = "finished") -> Any:
    return {
        "run_id": "ages-1",
        "state": state,
        "purpose": purpose,
        "created_at": "2026-11-23T12:00:00Z",
        "doing": "",
        "cause": "",
        "model_version": None,
        "plan": {"task": {"name": "pumps"}, "statistics": {}},
        "rounds": list(rounds),
    }


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the coordinator answers, by path; tests fill it."""
    known: dict[str, Any] = {}

    class Client:
        def __init__(self, _home: object) -> None:
            pass

        def get(self, path: str) -> Any:
            return known[path]

        def post(self, path: str, body: Any) -> Any:
            known["posted"] = body
            return known[path]

    for module in (statistics, runs):
        monkeypatch.setattr(module, "ApiClient", Client)
    return known


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_exact_figures_are_shown_whole_and_called_exact(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["/v1/runs/ages-1"] = a_run(record(1), record(2, COUNT))

    show_statistics("ages-1")

    said = printed(capsys)
    assert "count count 1234567 exact" in said
    assert "devices 6 noise none: the figures are exact" in said


def test_noised_figures_are_shown_with_their_error_and_their_cost(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    noised = record(1, VARIANCE, noise="distributed", epsilon=5.1234, delta=1e-6)
    answers["/v1/runs/ages-1"] = a_run(noised)

    show_statistics("ages-1")

    said = printed(capsys)
    assert "variance heat mean 20.04 0.51" in said
    assert "standard_deviation 3.2 -" in said
    assert "ε = 5.12 at δ = 1e-06 of each device's rows" in said


def test_figures_that_noise_has_swallowed_are_said_to_be_lost(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {**COUNT, "values": {}}
    answers["/v1/runs/ages-1"] = a_run(record(1, lost, noise="distributed"))

    show_statistics("ages-1")

    assert "lost in the noise" in printed(capsys)


def test_a_run_without_answers_says_where_to_look(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["/v1/runs/ages-1"] = a_run(record(1), state="failed")

    show_statistics("ages-1")

    assert "no answers; 'shoal run show' says who took part" in printed(capsys)


def test_a_run_that_trains_has_no_statistics_to_show(answers: dict[str, Any]) -> None:
    answers["/v1/runs/ages-1"] = a_run(purpose="train")

    with pytest.raises(ConfigError, match="asks for no statistics; see 'shoal run show ages-1'"):
        show_statistics("ages-1")


def test_only_runs_that_ask_are_listed(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trains = {**a_run(purpose="train"), "run_id": "tumour-1"}
    answers["/v1/runs"] = [a_run(), trains]

    list_statistics(as_json=True)

    assert [run["run_id"] for run in json.loads(capsys.readouterr().out)] == ["ages-1"]


def test_a_plan_without_statistics_is_not_started(tmp_path: Path, answers: dict[str, Any]) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)

    with pytest.raises(ConfigError, match="write what to ask, or train with"):
        start_statistics(tmp_path / "plan.toml")

    assert "posted" not in answers


def test_a_watched_plan_ends_with_its_answers(
    tmp_path: Path, answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.toml").write_text(f'{PLAN}[[statistics.of]]\nkind = "count"\n')
    answers["/v1/runs"] = answers["/v1/runs/ages-1"] = a_run(record(1, COUNT))

    start_statistics(tmp_path / "plan.toml", watch=True)

    assert answers["posted"]["privacy"]["noise"] == "distributed"
    said = printed(capsys)
    assert "finished: 'shoal stats show ages-1' tells the answers" in said
    assert "1234567 exact" in said
