"""What a device says is shown to people: it may neither steer a terminal nor forge a log line."""

import logging

import pytest

from cloud_coordinator.commands.output import print_facts, print_table
from cloud_coordinator.rounds.aggregation import check_statistics
from shared.errors import PeerError
from shared.logs import configure_logging, visible

STEERING = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202e"


def test_a_cause_cannot_steer_the_operators_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("device", "cause"), [("edge-1", STEERING)], empty="")
    print_facts({"cause": STEERING})
    shown = capsys.readouterr().out
    assert not any(c in shown for c in "\x1b\x07\x9b\u202e")
    assert "owned" in shown


@pytest.mark.parametrize("words", ["[/red]", "[link=file:///etc/passwd]x[/link]", "[bold"])
def test_a_cause_is_no_markup(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("device", "cause"), [("edge-1", words)], empty="")
    assert words in capsys.readouterr().out


def test_a_message_of_a_stranger_makes_one_line_in_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logging("INFO")
        logging.getLogger("t").warning("said %s", "x\n2026-01-01 INFO run committed" + STEERING)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].isprintable()


def test_visible_text_stays_as_it_is() -> None:
    assert visible("Grüße, 世界 …") == "Grüße, 世界 …"


def test_a_statistic_with_an_endless_name_is_refused() -> None:
    with pytest.raises(PeerError, match="too long"):
        check_statistics({"examples": 1.0, "x" * 10_000: 1.0})
