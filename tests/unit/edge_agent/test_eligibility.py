from dataclasses import dataclass

import msgspec
import pytest

from edge_agent.eligibility import No, Yes, decide, too_few
from edge_agent.privacy.policy import OwnerPolicy
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
    mode="secure",
    min_survivors=20,
)
STRICT = OwnerPolicy()


def test_an_idle_device_with_enough_data_says_yes() -> None:
    assert decide(INVITATION, Rows("mine", 128), STRICT, busy_with=None) == Yes("mine")


def test_the_run_it_works_for_may_invite_it_again() -> None:
    assert decide(INVITATION, Rows("mine", 128), STRICT, busy_with="run-1") == Yes("mine")


def test_a_busy_device_says_no_and_names_the_other_run() -> None:
    decision = decide(INVITATION, Rows("mine", 128), STRICT, busy_with="run-0")
    assert decision == No("this device already takes part in run run-0")


def test_a_device_without_data_passes_on_the_reason() -> None:
    reason = No("no data for task 'digits'")
    assert decide(INVITATION, reason, STRICT, busy_with=None) == reason


def test_a_device_with_too_little_data_says_no_but_not_how_little() -> None:
    decision = decide(INVITATION, Rows("mine", 127), STRICT, busy_with=None)
    assert isinstance(decision, No)
    assert decision.reason.startswith("fewer than 128 training examples here")
    assert "127" not in decision.reason


@pytest.mark.parametrize("rows", [1, 3, 100, 1000, 1023, 70_001])
def test_whoever_asks_for_ever_other_numbers_learns_no_more_than_a_power_of_two(rows: int) -> None:
    largest = max(asked for asked in range(1, 2 * rows + 2) if not too_few(rows, asked))
    assert largest == 2 ** (rows.bit_length() - 1)
    assert not too_few(rows, 1)
    assert too_few(0, 1)


def test_a_run_of_single_updates_needs_the_owner_s_word() -> None:
    plain = msgspec.structs.replace(INVITATION, mode="plain", min_survivors=0)
    generous = OwnerPolicy(individual_updates=True)

    refused = decide(plain, Rows("mine", 128), STRICT, busy_with=None)
    assert isinstance(refused, No)
    assert "individual_updates = false in policy.toml" in refused.reason
    assert decide(plain, Rows("mine", 128), generous, busy_with=None) == Yes("mine")


def test_sums_of_fewer_devices_than_the_owner_wants_are_declined_with_both_numbers() -> None:
    few = msgspec.structs.replace(INVITATION, min_survivors=17)

    decision = decide(few, Rows("mine", 128), STRICT, busy_with=None)

    assert decision == No(
        "this device's owner has min_cohort = 18 in policy.toml, and the run's sums may be of "
        "17 devices"
    )


def test_a_policy_that_cannot_be_read_allows_nothing() -> None:
    reason = No("this device's policy.toml cannot be read")
    assert decide(INVITATION, Rows("mine", 128), reason, busy_with=None) == reason
