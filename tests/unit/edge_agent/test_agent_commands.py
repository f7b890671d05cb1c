"""The commands of ``shoal-agent`` that need no daemon, and what the owner is shown."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_agent import __main__ as program
from edge_agent.settings import AgentSettings
from edge_agent.status import AgentStatus, Snapshot, describe
from shared.messages import DeploymentState

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """Run a command that must fail; return its one sentence on standard error."""
    monkeypatch.setattr("sys.argv", ["shoal-agent", *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("shoal-agent: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "setting", ["--inference-port=70000", "--telemetry-interval-s=0", "--log-level=loud"]
)
def test_an_impossible_setting_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    setting: str,
) -> None:
    said = run(monkeypatch, capsys, "run", "--home", str(tmp_path), setting)
    assert f"{setting.partition('=')[0]}: " in said
    assert "change it and try again" in said


@pytest.mark.parametrize("command", ["run", "status"])
def test_a_home_that_is_not_enrolled_is_told_how_to(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
) -> None:
    said = run(monkeypatch, capsys, command, "--home", str(tmp_path))
    assert f"run 'shoal-agent enroll --home {tmp_path}" in said


def test_enrolling_with_something_else_than_a_token_fails_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--home", str(tmp_path), "--coordinator", "http://127.0.0.1:1", "--token", "x")
    assert "not a join token" in run(monkeypatch, capsys, "enroll", *arguments)


def test_the_environment_sets_what_no_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_AGENT_TELEMETRY_INTERVAL_S", "5")
    monkeypatch.setenv("SHOAL_AGENT_INFERENCE_PORT", "1234")
    settings = AgentSettings(home=Path("home"), inference_port=99)
    assert (settings.telemetry_interval_s, settings.inference_port) == (5, 99)


def status(
    snapshot: Snapshot | None, *, tasks: tuple[str, ...] = (), running: bool = True
) -> AgentStatus:
    return AgentStatus(
        device_id="edge-1",
        fleet="main",
        coordinator="http://127.0.0.1:8470",
        running=running,
        tasks=tasks,
        serving_model="digits" if snapshot is not None else None,
        inference_url="http://127.0.0.1:8480" if running else None,
        snapshot=snapshot,
        read_at=NOW,
    )


def test_a_fresh_agent_is_described() -> None:
    lines = describe(status(None, running=False)).splitlines()
    assert lines == [
        "device    edge-1 of fleet main",
        "joined    http://127.0.0.1:8470",
        "daemon    does not run",
        "data for  no task; see shoal-agent data add",
        "training  nothing",
        "serving   no model yet",
    ]


def test_a_busy_agent_with_trouble_is_described() -> None:
    snapshot = Snapshot(
        pid=1,
        online=True,
        doing="run-1: training round 3",
        deployment=DeploymentState.FAILED,
        serving_version="ab" * 32,
        labelled=400,
        correct=389,
        cause="the download has digest 1 and the manifest names 2",
        outbox_depth=2,
    )
    lines = describe(status(snapshot, tasks=("digits", "faults"))).splitlines()
    assert lines[2:] == [
        "daemon    runs, online",
        "data for  digits, faults",
        "training  run-1: training round 3",
        "serving   model digits, version abababababab, at http://127.0.0.1:8480",
        "labels    400 came back, 97.2% of them as predicted",
        "trouble   the download has digest 1 and the manifest names 2",
        "unsent    2 messages wait for the coordinator",
    ]
