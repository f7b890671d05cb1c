"""What ``shoal run show`` says of how updates stayed secret."""

from typing import Any

import pytest

from cloud_coordinator.commands import runs
from cloud_coordinator.commands.runs import show_run
from tests.unit.cloud_coordinator.commands.test_run_watch import record, run


def shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    secrecy: dict[str, Any] | None,
) -> str:
    details = {
        **run("finished"),
        "plan": {"task": {"name": "tumour"}, "privacy": {"mode": "secure" if secrecy else "plain"}},
        "plan_digest": "cd" * 32,
        "rounds": [{**record(1), "secrecy": secrecy}],
        "invitations": [],
    }

    class Client:
        def __init__(self, _home: object) -> None:
            pass

        def get(self, _path: str) -> dict[str, Any]:
            return details

    monkeypatch.setattr(runs, "ApiClient", Client)
    show_run("tumour-1")
    return " ".join(capsys.readouterr().out.split())


GROUP = {"group": 0, "roster": 7, "survivors": 6, "corrupted": 1, "threshold": 4, "cause": ""}
SECRECY = {
    "groups": [GROUP],
    "noise": "none",
    "epsilon": None,
    "bytes_up": 4096,
    "blamed": {"clinic-b": "signed something that is no Shared"},
}


def test_an_exact_sum_says_of_how_many_it_is_and_that_there_is_no_noise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = shown(capsys, monkeypatch, SECRECY)

    assert "6 of 7 1 corrupted none: exact sums 4.0 clinic-b: signed something" in said


def test_noise_shows_its_epsilon_and_whether_it_is_only_promised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noised = {**SECRECY, "noise": "distributed", "epsilon": 1.234}
    assert "distributed, ε = 1.23 4.0" in shown(capsys, monkeypatch, noised)
    central = {**SECRECY, "noise": "central", "epsilon": 1.234}
    assert "central, ε = 1.23, only promised" in shown(capsys, monkeypatch, central)


def test_plain_rounds_are_said_to_be_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the coordinator saw each device's update" in shown(capsys, monkeypatch, None)
