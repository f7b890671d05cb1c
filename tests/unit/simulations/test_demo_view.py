"""What the demo shows fits a terminal of 80 columns, and nothing of it is cut."""

from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from simulations.demo_view import (
    partition_table,
    results_table,
    rollback_words,
    rollout_table,
    rounds_table,
    secrecy_words,
)

AGENTS = [f"agent-{number}" for number in range(1, 6)]
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat"]
CLASSES += ["sandal", "shirt", "sneaker", "bag", "ankle-boot"]


def shown(table: Table | str) -> str:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    return text


def participation(device_id: str, *, outcome: str = "replied", cause: str = "") -> dict[str, Any]:
    sizes = {"bytes_down": 848_896, "bytes_up": 424_448}
    return {"device_id": device_id, "outcome": outcome, "cause": cause, **sizes}


def run(*parts: dict[str, Any]) -> dict[str, Any]:
    record = {
        "round_number": 10,
        "state": "committed",
        "cause": "",
        "seconds": 14.2,
        "metrics": {"loss": 2.6663, "accuracy": 1.0},
        "participations": parts,
    }
    names = {"run_id": "demo-cb949728", "state": "running", "doing": "training", "cause": ""}
    return {**names, "rounds": [record]}


@pytest.mark.parametrize("number_of_agents", [2, 5])
def test_who_owns_what_shows_every_count(number_of_agents: int) -> None:
    counts = {agent: np.arange(10) * 1111 for agent in AGENTS[:number_of_agents]}
    text = shown(partition_table(counts, CLASSES))
    assert text.count("9999") == number_of_agents
    assert text.count("49995") == number_of_agents  # the totals
    assert all(name in text for name in CLASSES)


def test_more_agents_than_classes_stand_below_each_other() -> None:
    counts = {f"agent-{number}": np.array([1, 2]) for number in range(1, 51)}
    assert "│ agent-50 │" in shown(partition_table(counts, ["ok", "broken"]))


def test_a_round_of_all_is_short() -> None:
    text = shown(rounds_table(run(*map(participation, AGENTS))))
    assert "│ all 5" in text
    assert "4,145" in text


def test_a_round_without_some_names_who_took_part_and_why_others_did_not() -> None:
    failed = participation("agent-5", outcome="failed", cause="too slow")
    text = shown(rounds_table(run(*map(participation, AGENTS[:4]), failed)))
    assert all(agent in text for agent in AGENTS)
    assert "too slow" in text


def test_the_results_of_an_agent_stand_in_one_line() -> None:
    row = {
        "agent": "agent-1",
        "before": 0.0365,
        "after": 0.8657,
        "serving": "6b17e0b1c691" * 5,
        "wanted": "6b17e0b1c691" * 5,
        "full_bytes": 425_996,
        "shipped_bytes": 108_902,
        "p50_ms": 0.82,
    }
    line = "│ agent-1 │  3.65% │ 86.57% │ 6b17e0b1c691 │ verified │ 416 → 106 │   0.82 │"
    assert line in shown(results_table([row]))


def test_it_says_what_the_coordinator_saw() -> None:
    secrecy = {"groups": [{"survivors": 5, "corrupted": 1}], "bytes_up": 213_624}
    initial: dict[str, Any] = {"secrecy": None}
    text = " ".join(shown(secrecy_words({"rounds": [initial, {"secrecy": secrecy}]})).split())
    assert (
        "each round reached the coordinator only as a sum of 5 agents, exact, 209 KiB from each"
        in text
    )
    assert "fleet key, which says who is an agent, lies beside the coordinator" in text


def rollout(**changed: Any) -> dict[str, Any]:
    member = {"device_id": "agent-3", "wave": 1, "standing": "serving", "cause": ""}
    given = {
        "version": "a" * 64,
        "state": "rolled_back",
        "wave": 1,
        "waves": 2,
        "gate": "latency",
        "cause": "it takes 19.3 times as long as the version before, at most 3 are allowed",
        "devices": [member],
    }
    return given | changed


def test_a_rollout_shows_who_is_in_which_wave() -> None:
    text = " ".join(shown(rollout_table(rollout(state="rolling_back"))).split())
    assert "Rolling out aaaaaaaaaaaa wave 1 of 2: rolling back" in text
    assert "agent-3" in text


def test_a_rollback_names_its_gate_and_who_serves_what() -> None:
    text = shown(rollback_words(rollout(), 5, 5))
    assert "agent-3 tried it, alone. Gate latency: it takes 19.3 times" in " ".join(text.split())
    assert "5 of 5 agents serve the version before" in text
