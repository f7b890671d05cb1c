from dataclasses import dataclass

from edge_agent.eligibility import No, Yes, decide
from shared.messages import Invitation
from shared.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Rows:
    name: str
    train_rows: int


INVITATION = Invitation(
    run_id="run-1",
    session_id="s",
    task=TaskSpec("digits", "image-classification"),
    min_examples=100,
    superlink_address="127.0.0.1:1",
    lease_s=60,
)


def test_an_idle_device_with_enough_data_says_yes() -> None:
    assert decide(INVITATION, Rows("mine", 100), busy_with=None) == Yes("mine")


def test_the_run_it_works_for_may_invite_it_again() -> None:
    assert decide(INVITATION, Rows("mine", 100), busy_with="run-1") == Yes("mine")


def test_a_busy_device_says_no_and_names_the_other_run() -> None:
    decision = decide(INVITATION, Rows("mine", 100), busy_with="run-0")
    assert decision == No("this device already takes part in run run-0")


def test_a_device_without_data_passes_on_the_reason() -> None:
    reason = No("no data for task 'digits'")
    assert decide(INVITATION, reason, busy_with=None) == reason


def test_a_device_with_too_little_data_says_no_but_not_how_little() -> None:
    decision = decide(INVITATION, Rows("mine", 99), busy_with=None)
    assert decision == No("fewer training examples here than the 100 asked for")
