"""Whoever is killed between two stages of a round: it goes on, and nobody answers twice.

The broker stands still while a process is killed, so it is dead before the message that marks the
boundary is delivered. What devices said before and after is on record.
"""

import base64
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from shared.secure_sum.messages import SignedAnswer, decode
from tests.integration.security.live_sums import DEADLINE_S, DEVICES, LiveSums, plan
from tests.integration.security.mqtt_tap import Published

POINTS = (  # first of its kind in a round; what it says is done, and nothing of the next stage
    "asked to train",
    "trained",
    "asked to share",
    "shared",
    "asked to mask",
    "masked",
    "asked to consent",
    "consented",
    "asked to reveal",
    "revealed",
)
KINDS = {
    "asked to train": "run.nudge",
    "trained": "run.reply-waiting",
    "asked to share": "sum.question share",
    "shared": "sum.answer share",
    "asked to mask": "run.nudge",
    "masked": "run.reply-waiting",
    "asked to consent": "sum.question consent",
    "consented": "sum.answer consent",
    "asked to reveal": "sum.question reveal",
    "revealed": "sum.answer reveal",
}
VICTIMS = ("trainer", "agent", "worker", "superlink", "coordinator")
Kill = tuple[str, str]  # victim, point


class Killer:
    """Kills one process after the other, each in a round of its own, when all are well again."""

    def __init__(self, live: LiveSums, run_id: str, kills: Sequence[Kill]) -> None:
        self.left = list(kills)
        self._live, self._run_id = live, run_id
        self._devices = iter(DEVICES * len(kills))
        self._next_point: int | None = None  # of the round; None: not armed, or no round began
        self._armed, self._rounds_at_kill = True, -1

    def hook(self, message: Published) -> Iterator[Published]:
        """Follow the round, and strike at the point that is next."""
        if message.body.get("run_id") != self._run_id or not (self._armed and self.left):
            return
        if self._next_point is None:  # wait for the end of a round whose course is known
            if message.kind == KINDS["revealed"]:
                self._next_point = 0
            elif self._rounds_at_kill < 0 and message.kind == KINDS["asked to train"]:
                self._next_point = 0  # the first round of all
        if self._next_point is None or message.kind != KINDS[POINTS[self._next_point]]:
            return
        victim, point = self.left[0]
        if POINTS[self._next_point] == point:
            self._armed, self._next_point, self._rounds_at_kill = False, None, sys.maxsize
            self._live.kill(self._name_of(victim, message))
            self.left.pop(0)
        else:
            self._next_point = (self._next_point + 1) % len(POINTS)
        yield from ()

    def _name_of(self, victim: str, message: Published) -> str:
        if victim in {"worker", "superlink", "coordinator"}:
            return victim
        device = next(self._devices)
        if f"/d/{device}/" in message.topic:  # let the message be somebody else's
            device = next(self._devices)
        return f"trainer of {device}" if victim == "trainer" else device

    @property
    def is_done(self) -> bool:
        """Whether all are dead who should be, and all is well again."""
        return self._armed and not self.left

    def tend(self) -> None:
        """Start again what we ended, and make ready for the next once a round went well."""
        live = self._live
        if live.fleet.coordinator is None:
            live.start_coordinator()
        for name in set(DEVICES) - set(live.fleet.agents):
            live.start_agent(name)
        if self._armed:
            return
        run: dict[str, Any] = live.fleet.get(f"/v1/runs/{self._run_id}")
        closed = len(run["rounds"])
        self._rounds_at_kill = min(self._rounds_at_kill, closed)
        last = run["rounds"][-1]["participations"] if run["rounds"] else ()
        everybody = len(last) == len(DEVICES) and all(p["outcome"] == "replied" for p in last)
        if closed > self._rounds_at_kill and everybody:
            self._rounds_at_kill, self._armed = closed, True


def perform(live: LiveSums, kills: Sequence[Kill]) -> None:
    """Do all kills in one run, and look what came of it."""
    asked = plan()
    run_id = live.start_run(asked)
    killer = Killer(live, run_id, kills)
    live.tap.hook = killer.hook
    try:
        run = live.follow(
            run_id,
            lambda _: killer.is_done,
            between=killer.tend,
            deadline_s=DEADLINE_S + 60 * len(kills),
        )
    finally:
        live.tap.hook = lambda _: ()
        killer.tend()

    for record in run["rounds"]:
        assert record["state"] == "committed" or record["cause"], record
    np.testing.assert_allclose(
        live.committed(run), live.averaged_by_hand(asked, run), rtol=1e-4, atol=1e-5
    )
    nobody_answered_twice(live)


def nobody_answered_twice(live: LiveSums) -> None:
    """Check all that ever left these devices."""
    answers: defaultdict[tuple[str, bytes, str], set[bytes]] = defaultdict(set)
    for message in live.tap.published:
        if message.body.get("type") == "sum.answer":
            content = base64.b64decode(message.body["answer"])
            answer = decode(content, SignedAnswer)
            if not answer.refusal:
                answers[answer.device_id, answer.session, answer.stage].add(content)
    assert answers
    assert [key for key, said in answers.items() if len(said) > 1] == []

    vectors: defaultdict[tuple[str, str], set[bytes]] = defaultdict(set)
    for one in live.hidden("left"):
        vectors[one["device"], one["question"]].add(msgspec.json.encode(one))
    assert vectors
    assert [key for key, left in vectors.items() if len(left) > 1] == []


def test_a_few_are_killed_between_stages_and_each_round_commits_the_mean_of_who_is_left(
    live: LiveSums,
) -> None:
    kills = [
        ("trainer", "asked to consent"),
        ("worker", "masked"),
        ("agent", "asked to mask"),
        ("coordinator", "asked to reveal"),
        ("superlink", "consented"),
    ]
    perform(live, kills)


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_anybody_is_killed_between_any_two_stages(live: LiveSums, victim: str) -> None:
    perform(live, [(victim, point) for point in POINTS])
