"""When a trainer that nobody speaks to ends by itself, on a clock that waiting moves."""

import queue
from collections.abc import Callable
from typing import Any

import pytest

from edge_agent import trainer_loop
from edge_agent.trainer_messages import (
    MessageWaits,
    RejoinTraining,
    StageQuestion,
    StopTraining,
)

LEASE_S = 100.0


class Trainer:
    """Clock, mailbox and work in one; ``busy`` and ``answered_at`` are functions of the time."""

    def __init__(
        self,
        *,
        busy: Callable[[float], bool] = lambda _: False,
        answered_at: Callable[[float], float] = lambda _: 0.0,
        messages: tuple[tuple[float, Any], ...] = (),
    ) -> None:
        self.now_s, self.woken = 0.0, 0
        self.asked: list[StageQuestion] = []
        self.following: RejoinTraining | None = None
        self._busy, self._answered_at, self._messages = busy, answered_at, list(messages)

    def monotonic(self) -> float:
        return self.now_s

    @property
    def is_busy(self) -> bool:
        return self._busy(self.now_s)

    @property
    def answered_at(self) -> float:
        return self._answered_at(self.now_s)

    def wake(self) -> None:
        self.woken += 1

    def ask(self, question: StageQuestion) -> None:
        self.asked.append(question)

    def get(self, timeout: float) -> Any:
        assert timeout >= 0
        if self._messages and self._messages[0][0] <= self.now_s + timeout:
            self.now_s, message = self._messages.pop(0)
            return message
        self.now_s += timeout
        raise queue.Empty

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> float:
        """Return when it stopped listening."""
        monkeypatch.setattr(trainer_loop, "time", self)
        self.following = trainer_loop._listen(self, self, self, lease_s=LEASE_S)  # type: ignore[arg-type]
        return self.now_s


def test_it_ends_when_nothing_came_for_the_length_of_its_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Trainer().listen(monkeypatch) == LEASE_S


def test_a_nudge_wakes_it_and_renews_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(messages=((60.0, MessageWaits()),))
    assert trainer.listen(monkeypatch) == 60.0 + LEASE_S
    assert trainer.woken == 1


def test_a_question_is_passed_on_while_training_and_renews_the_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    question = StageQuestion(message_id="m", session=bytes(32), stage="share", question=b"roster")
    trainer = Trainer(busy=lambda now: now < 90.0, messages=((60.0, question),))
    assert trainer.listen(monkeypatch) == 60.0 + LEASE_S
    assert trainer.asked == [question]


def test_it_goes_on_elsewhere_when_the_run_has_a_new_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rejoin = RejoinTraining(
        session_id="s2", superlink_address="a:1", superlink_ca_pem="pem", lease_s=1.0
    )
    trainer = Trainer(busy=lambda _: True, messages=((60.0, rejoin),))
    assert trainer.listen(monkeypatch) == 60.0
    assert trainer.following == rejoin


def test_an_answer_renews_the_lease_however_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(
        busy=lambda now: now < 500.0, answered_at=lambda now: 0.0 if now < 500.0 else 500.0
    )
    assert trainer.listen(monkeypatch) == 500.0 + LEASE_S


def test_looking_in_vain_renews_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(busy=lambda now: now < LEASE_S + 10.0)
    assert trainer.listen(monkeypatch) <= LEASE_S + 11.0


@pytest.mark.parametrize("last", [StopTraining("enough"), None])
def test_it_ends_at_once_when_told_or_left_alone(
    monkeypatch: pytest.MonkeyPatch, last: StopTraining | None
) -> None:
    assert Trainer(busy=lambda _: True, messages=((5.0, last),)).listen(monkeypatch) == 5.0
