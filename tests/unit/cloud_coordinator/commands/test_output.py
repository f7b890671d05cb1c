"""How commands print for people at terminals, and for pipes."""

import pytest

from cloud_coordinator.commands.output import print_facts, print_table

LONG = "two-moons-2375abcd " * 8


def test_a_row_stays_one_line_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(("run", "now"), [("a", LONG)], empty="")
    print_facts({"now": LONG})
    lines = capsys.readouterr().out.splitlines()
    assert [LONG.strip() in line for line in lines] == [False, True, True]


def test_a_narrow_terminal_folds_ids_and_cuts_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_table(("version", "run"), [("ac4158422d45", "two-moons-2375abcd")], empty="")
    print_facts({"version": "0123456789" * 5})
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 30
