"""The shell around a device's part in secure sums: whole sessions, attacks, crashes, full disks."""

import dataclasses
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.secure_sums import SecureSums
from shared.errors import PeerError, PolicyError
from shared.membership import Member
from shared.secure_sum.config import ExactLane, SumConfig, digest_of, encode_config
from shared.secure_sum.encoding import decode_sum
from shared.secure_sum.messages import Survivors, check_answer, encode
from shared.signing import SigningKey
from tests.unit.edge_agent.sum_fleet import (
    ENCODING,
    NOW,
    Fleet,
    Session,
    config_of,
    data_of,
    noised_config_of,
    open_at,
    refusal,
    signed,
    vector_of,
)

NAMES = ("edge-1", "edge-2", "edge-3", "edge-4", "edge-5")
EXAMPLES = {"examples": 10.0}
FOUR: dict[str, Any] = {"drop_fraction": 0.0}  # four devices cannot lose one and reach t


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, *NAMES)


@pytest.fixture
def sums(fleet: Fleet) -> Iterator[dict[str, SecureSums]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(fleet.sums(name)) for name in NAMES}


@pytest.fixture
def device(sums: dict[str, SecureSums]) -> SecureSums:
    return sums["edge-1"]


def ledger(fleet: Fleet, query: str, name: str = "edge-1") -> list[Any]:
    """Ask a device's database, as another process would."""
    with closing(sqlite3.connect(fleet.homes[name] / "privacy.db")) as connection:
        return connection.execute(query).fetchall()


def state_of(fleet: Fleet, config: SumConfig, name: str = "edge-1") -> str:
    states = dict(ledger(fleet, "SELECT session, state FROM sessions", name))
    return str(states[config.session])


def charges(fleet: Fleet, name: str = "edge-1") -> int:
    ((count,),) = ledger(fleet, "SELECT COUNT(*) FROM charges", name)
    return int(count)


def write_policy(fleet: Fleet, text: str, name: str = "edge-1") -> None:
    (fleet.homes[name] / "policy.toml").write_text(text)


# --- whole sessions ------------------------------------------------------------------------------


def test_devices_sum_their_vectors(fleet: Fleet, sums: dict[str, SecureSums]) -> None:
    config = config_of()
    result = Session(fleet, config, sums).run()
    assert result is not None
    total, exact = decode_sum(config, result.lanes, count=len(NAMES))
    assert np.abs(total - sum(vector_of(n, config) for n in range(5))).max() < 5 / 500
    assert exact == {"examples": 150.0}
    assert state_of(fleet, config) == "revealed"
    assert ledger(fleet, "SELECT kind, part, digest FROM charges") == [("exact", "train", "d" * 64)]


def test_a_device_that_drops_after_the_shares_is_no_loss(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    session.mask(without=["edge-5"])
    session.consent()
    result = session.reveal()
    total, _ = decode_sum(config, result.lanes, count=4)
    assert np.abs(total - sum(vector_of(n, config) for n in range(4))).max() < 4 / 500
    assert charges(fleet, "edge-5") == 0  # nothing of it left


def test_noised_sums_are_charged_by_their_curve(fleet: Fleet, sums: dict[str, SecureSums]) -> None:
    Session(fleet, noised_config_of(), sums).run()
    ((kind, curve),) = ledger(fleet, "SELECT kind, curve FROM charges")
    assert kind == "noised"
    assert curve


def test_a_sum_of_statistics_alone_needs_no_parameters(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    lanes = (ExactLane(name="rows", max_steps=1000), ExactLane(name="sum", max_steps=1000))
    config = config_of(
        purpose="statistics",
        base_digest=None,
        exact_lanes=lanes,
        encoding=msgspec.structs.replace(ENCODING, length=0),
    )
    for sum_ in sums.values():
        opened = open_at(sum_, fleet, config)
        assert not signed(sum_.advertise(opened, None, {"rows": 3.0, "sum": 4.0})).refusal


def test_training_and_evaluation_may_be_under_way_at_once(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    train, measure = config_of(), config_of(purpose="evaluate", question_digest="7" * 64)
    sessions = [Session(fleet, config, sums) for config in (train, measure)]
    for stage in ("advertise", "share", "mask", "consent", "reveal"):
        for session in sessions:
            getattr(session, stage)()
    assert state_of(fleet, train) == state_of(fleet, measure) == "revealed"


# --- what is refused before anything is trained --------------------------------------------------


@pytest.mark.parametrize(
    ("received", "words"),
    [
        ({"base_digest": "4" * 64}, "the parameters that came with this sum"),
        ({"base_digest": None}, "the parameters that came with this sum"),
        ({"question_digest": "4" * 64}, "the question that came with this sum"),
        ({"task_digest": "4" * 64}, "the task that came with this sum"),
    ],
)
def test_a_device_that_received_something_else_than_was_signed_refuses(
    fleet: Fleet, device: SecureSums, received: dict[str, Any], words: str
) -> None:
    with pytest.raises(PeerError, match=words):
        open_at(device, fleet, config_of(), **received)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fleet": "other"}, "fleet 'other', not 'main'"),
        ({"expires_at": NOW}, "expired at 2026-11-23 12:00:00Z"),
        ({"expires_at": NOW + timedelta(days=9)}, "may last 8 days"),
    ],
)
def test_a_sum_of_another_fleet_or_time_is_refused(
    fleet: Fleet, device: SecureSums, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PeerError, match=words):
        open_at(device, fleet, config_of(**changes))


def test_a_configuration_that_another_key_signed_is_refused(
    fleet: Fleet, device: SecureSums
) -> None:
    fleet.command_key = SigningKey.generate()
    with pytest.raises(PeerError, match="signed by no key that is trusted"):
        open_at(device, fleet, config_of())


def test_a_device_trains_on_its_training_rows_only(fleet: Fleet, device: SecureSums) -> None:
    data = dataclasses.replace(data_of(device), part="held-out")
    with pytest.raises(PeerError, match="training rows only"):
        open_at(device, fleet, config_of(), data=data)
    open_at(device, fleet, config_of(purpose="evaluate"), data=data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corrupt_fraction": 0.0}, "corrupt_fraction = 0.1"),
        ({"purpose": "statistics", "base_digest": None, "groups": 2}, "one group only"),
    ],
)
def test_what_the_owner_does_not_allow_is_refused_and_nothing_is_noted(
    fleet: Fleet, device: SecureSums, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PolicyError, match=words):
        open_at(device, fleet, config_of(**changes))
    assert ledger(fleet, "SELECT * FROM sessions") == []


def test_an_exact_sum_needs_the_owners_permission(fleet: Fleet, device: SecureSums) -> None:
    write_policy(fleet, "min_cohort = 3")
    with pytest.raises(PolicyError, match="exact_sums = false"):
        open_at(device, fleet, config_of())
    open_at(device, fleet, noised_config_of())


def test_a_policy_that_cannot_be_read_refuses_everything_and_names_no_path(
    fleet: Fleet, device: SecureSums
) -> None:
    write_policy(fleet, "min_cohrt = 3")
    with pytest.raises(PolicyError, match=r"policy\.toml cannot be read") as caught:
        open_at(device, fleet, config_of())
    assert str(fleet.homes["edge-1"]) not in str(caught.value)


def test_a_device_that_the_fleet_key_did_not_list_takes_part_in_nothing(
    fleet: Fleet, device: SecureSums
) -> None:
    own = fleet.members.pop("edge-1")
    with pytest.raises(PeerError, match="does not name edge-1 yet"):
        open_at(device, fleet, config_of())
    fleet.members["edge-1"] = Member("edge-1", SigningKey.generate().public, own.known_since)
    with pytest.raises(PeerError, match="another key for edge-1"):
        open_at(device, fleet, config_of())


def test_peers_that_must_be_there_are_looked_for_before_training(
    fleet: Fleet, device: SecureSums
) -> None:
    write_policy(fleet, 'min_cohort = 3\nexact_sums = true\nrequired_peers = ["edge-9"]')
    with pytest.raises(PolicyError, match="required_peers has 'edge-9'"):
        open_at(device, fleet, config_of())


def test_a_roster_that_the_owner_does_not_accept_is_refused(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    write_policy(fleet, 'min_cohort = 3\nexact_sums = true\nrequired_peers = ["edge-5"]')
    config = config_of()
    session = Session(fleet, config, {name: sums[name] for name in NAMES[:3]})
    session.advertise()
    question = encode(session.server.close_advertising())
    assert "required_peers has 'edge-5'" in refusal(session.ask("edge-1", "share", question))
    assert not signed(session.ask("edge-2", "share", question)).refusal
    assert state_of(fleet, config) == "refused"


def test_a_budget_that_does_not_bear_the_sum_is_found_before_training(
    fleet: Fleet, device: SecureSums
) -> None:
    write_policy(fleet, "min_cohort = 3\nepsilon = 0.01")
    with pytest.raises(PolicyError, match=r"epsilon = 0\.01 at delta = 1e-06"):
        open_at(device, fleet, noised_config_of())


def test_a_session_is_opened_once_in_whatever_process(fleet: Fleet, device: SecureSums) -> None:
    config = config_of()
    open_at(device, fleet, config)
    with fleet.sums("edge-1") as other, pytest.raises(PeerError, match="opened before"):
        open_at(other, fleet, config)


# --- once is all (R1) ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"round_number": 2}, {"round_number": 2, "group": 0}])
def test_a_claimed_abort_gets_no_second_vector(
    fleet: Fleet, sums: dict[str, SecureSums], changes: dict[str, Any]
) -> None:
    Session(fleet, config_of(), sums).run(until="mask")
    for name in NAMES:
        with pytest.raises(PeerError, match=r"it is spent.* can only be resumed"):
            open_at(sums[name], fleet, config_of(**changes))  # before anything is trained anew
        assert charges(fleet, name) == 1


def test_a_spent_vector_is_spent_for_a_new_process_too(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Session(fleet, config_of(), sums).run(until="mask")
    sums["edge-1"].close()
    with fleet.sums("edge-1") as reborn, pytest.raises(PeerError, match="it is spent"):
        open_at(reborn, fleet, config_of(round_number=2))


def test_renaming_the_data_does_not_unspend_them(
    fleet: Fleet, sums: dict[str, SecureSums], device: SecureSums
) -> None:
    Session(fleet, config_of(), sums).run(until="mask")
    renamed = device.data_use(name="other", path="/elsewhere.csv", digest="d" * 64, part="train")
    with pytest.raises(PeerError, match="it is spent"):
        open_at(device, fleet, config_of(round_number=2), data=renamed)


def test_a_round_that_failed_before_vectors_left_may_be_tried_again(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    first, second = config_of(), config_of()
    Session(fleet, first, sums).run(until="share")
    Session(fleet, second, sums).run()
    assert state_of(fleet, first) == "expired"  # the later session took its place
    assert state_of(fleet, second) == "revealed"


def test_with_noise_a_second_vector_is_another_full_charge(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    for _ in range(2):
        Session(fleet, noised_config_of(), sums).run(until="mask")
    assert charges(fleet) == 2


def test_a_run_never_goes_back(fleet: Fleet, sums: dict[str, SecureSums]) -> None:
    Session(fleet, config_of(round_number=5), sums).run()
    older = config_of(round_number=4, base_digest="5" * 64)
    over = pytest.raises(PeerError, match="round 4 of run run-1 is over")
    with fleet.sums("edge-1") as reborn, over:
        open_at(reborn, fleet, older)
    with pytest.raises(PeerError, match="round 4 is over"):
        open_at(sums["edge-1"], fleet, older)
    open_at(sums["edge-1"], fleet, config_of(round_number=6, base_digest="5" * 64))
    with pytest.raises(PeerError, match="round 5 is over: a later one has begun here"):
        open_at(sums["edge-1"], fleet, config_of(round_number=5, base_digest="6" * 64))


def test_a_device_stays_in_its_group_unless_the_sums_are_noised(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Session(fleet, config_of(group=0, groups=2), sums).run()
    later: dict[str, Any] = {"round_number": 2, "base_digest": "5" * 64, "group": 1, "groups": 2}
    with pytest.raises(PeerError, match="in group 0 of run run-1 for good"):
        open_at(sums["edge-1"], fleet, config_of(**later))
    open_at(sums["edge-1"], fleet, noised_config_of(**later))


def test_two_processes_that_both_have_a_vector_send_one(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    first = Session(fleet, config_of(), sums)
    first.run(until="share")
    with fleet.sums("edge-1") as twin:
        second = Session(fleet, config_of(), {**sums, "edge-1": twin})
        second.run(until="share")
        answers: list[str] = []

        def mask(device: SecureSums, session: Session) -> None:
            question = session.questions["edge-1", "mask"]
            answer, lanes = device.mask(session.config.session, question)
            assert (lanes is None) == bool(signed(answer).refusal)
            answers.append(signed(answer).refusal)

        at_once(lambda: mask(sums["edge-1"], first), lambda: mask(twin, second))
    assert sorted(map(bool, answers)) == [False, True]
    assert "it is spent" in max(answers)
    assert charges(fleet) == 1


def at_once(*jobs: Callable[[], None]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- one answer per stage (R16) ------------------------------------------------------------------


def test_the_same_question_gets_the_same_bytes_and_costs_nothing(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="mask")
    question = session.questions["edge-1", "mask"]
    answer, lanes = sums["edge-1"].mask(config.session, question)
    assert lanes is session.lanes["edge-1"]
    assert signed(answer).body
    with pytest.raises(ValueError, match="read-only"):
        lanes.main[0] = 0
    assert charges(fleet) == 1
    session.consent()
    session.reveal()
    for stage in ("share", "consent", "reveal"):
        asked = session.questions["edge-1", stage]
        again = [sums["edge-1"].answer(config.session, stage, asked) for _ in range(2)]
        assert again[0] == again[1]
        assert not signed(again[0]).refusal


def test_threads_that_carry_the_same_question_get_one_vector(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    question, got = session.questions["edge-1", "mask"], []
    at_once(*[lambda: got.append(sums["edge-1"].mask(config.session, question))] * 4)
    assert len({answer for answer, _ in got}) == 1
    assert len({id(lanes) for _, lanes in got}) == 1
    assert charges(fleet) == 1


def test_another_question_at_an_answered_stage_is_refused_and_the_session_goes_on(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="mask")
    answer, lanes = sums["edge-1"].mask(config.session, session.questions["edge-2", "mask"])
    assert refusal(answer) == "another question was answered at this stage"
    assert lanes is None
    session.consent()
    other = encode(Survivors(b"\x0f"))
    assert "another question" in refusal(session.ask("edge-1", "consent", other))
    assert session.reveal().survivors == NAMES


def test_a_stage_out_of_turn_is_refused_and_the_session_goes_on(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    everybody = encode(Survivors(b"\x1f"))
    answer = session.ask("edge-1", "consent", everybody)
    assert refusal(answer) == "the stage 'mask' comes before this one"
    session.mask()
    session.consent()
    assert session.reveal().survivors == NAMES


def test_a_question_that_breaks_a_rule_ends_the_session_and_forgets_the_secrets(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="mask")
    client = sums["edge-1"]._sessions[config.session].client
    assert client is not None
    assert "our own vector is not in the sum" in refusal(
        session.ask("edge-1", "consent", encode(Survivors(b"\x1e")))
    )
    assert client._secrets is None
    assert not client._received
    assert config.session not in sums["edge-1"]._sessions
    assert state_of(fleet, config) == "refused"
    assert charges(fleet) == 1  # the vector is out, whatever came of it


@pytest.mark.parametrize("stage", ["share", "mask", "consent", "reveal"])
def test_garbage_ends_in_a_signed_refusal(
    fleet: Fleet, sums: dict[str, SecureSums], stage: str
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    before = {"share": "advertise", "mask": "share", "consent": "mask", "reveal": "consent"}
    session.run(until=before[stage])
    if stage == "mask":
        answer, lanes = sums["edge-1"].mask(config.session, b"\xc1 garbage")
        assert lanes is None
        assert charges(fleet) == 0
    else:
        answer = session.ask("edge-1", stage, b"\xc1 garbage")
    assert "not a " in refusal(answer)
    check_answer(
        signed(answer),
        fleet.members["edge-1"].key,
        config_digest=digest_of(encode_config(config)),
        roster_digest=b"",
    )


def test_a_session_that_was_never_opened_here_gets_nothing_signed(device: SecureSums) -> None:
    with pytest.raises(PeerError, match="no such session was opened"):
        device.answer(bytes(32), "share", b"")
    with pytest.raises(PeerError, match="no such session was opened"):
        device.mask(bytes(32), b"")


# --- charged before it leaves, refunded only if nothing left (R9) --------------------------------


def test_a_policy_that_became_stricter_while_training_holds(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    write_policy(fleet, "min_cohort = 3\nexact_sums = false")
    answer, lanes = sums["edge-1"].mask(config.session, session.questions["edge-1", "mask"])
    assert "exact_sums = false" in refusal(answer)
    assert lanes is None
    assert charges(fleet) == 0


def test_a_budget_that_was_spent_meanwhile_holds(fleet: Fleet, sums: dict[str, SecureSums]) -> None:
    sessions = [
        Session(fleet, config_of(run_id=f"run-{number}", question_digest=f"{number}" * 64), sums)
        for number in range(2)
    ]
    write_policy(fleet, "min_cohort = 3\nexact_sums = true\nmax_exact_sums = 1")
    for session in sessions:
        session.run(until="share")
    answers = [
        sums["edge-1"].mask(session.config.session, session.questions["edge-1", "mask"])
        for session in sessions
    ]
    assert answers[0][1] is not None
    assert answers[1][1] is None
    assert "max_exact_sums = 1" in refusal(answers[1][0])
    assert charges(fleet) == 1


def test_bad_boxes_cost_nothing_since_nothing_left(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    answer, lanes = sums["edge-1"].mask(config.session, b"\x91\x90")  # no boxes at all
    assert "devices dealt shares" in refusal(answer)
    assert lanes is None
    assert charges(fleet) == 0
    assert ledger(fleet, "SELECT * FROM spent") == []
    open_at(sums["edge-1"], fleet, config_of())  # another attempt may be made


def test_what_fails_before_the_vector_is_handed_out_costs_nothing(
    fleet: Fleet, sums: dict[str, SecureSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("edge_agent.secure_sums.encode_vector", fail)
    with pytest.raises(MemoryError):
        sums["edge-1"].mask(config.session, session.questions["edge-1", "mask"])
    assert charges(fleet) == 0
    assert ledger(fleet, "SELECT * FROM spent") == []
    assert state_of(fleet, config) == "refused"


def test_on_a_full_disk_nothing_leaves_and_no_path_is_told(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    connection = sums["edge-1"]._records._store._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute("PRAGMA journal_size_limit = 0")
    connection.execute(f"PRAGMA max_page_count = {pages}")
    connection.execute(
        "CREATE TEMP TRIGGER full BEFORE INSERT ON charges BEGIN "
        "INSERT INTO spent VALUES (zeroblob(99999), '', '', '', '', ''); END"
    )
    answer, lanes = sums["edge-1"].mask(config.session, session.questions["edge-1", "mask"])
    assert refusal(answer) == "this device cannot write its ledger now"
    assert lanes is None
    assert charges(fleet) == 0


# --- killed (R1) ---------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def die_in_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a child that is gone at once when it calls ``os._exit(9)``."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(
    ("stage", "charged"),
    [("advertise", 0), ("share", 0), ("mask", 1), ("consent", 1), ("reveal", 1)],
)
def test_a_killed_trainer_leaves_a_lost_session_that_answers_nothing(
    fleet: Fleet, stage: str, charged: int
) -> None:
    config = config_of()

    def work() -> None:
        Session(fleet, config, {name: fleet.sums(name) for name in NAMES}).run(until=stage)
        os._exit(9)

    die_in_child(work)
    with fleet.sums("edge-1") as reborn:
        ended = "revealed" if stage == "reveal" else "lost"
        assert state_of(fleet, config) == ended
        for asked in ("share", "consent", "reveal"):
            assert f"this session is {ended} on this device" in refusal(
                reborn.answer(config.session, asked, b"")
            )
        answer, lanes = reborn.mask(config.session, b"")
        assert ended in refusal(answer)
        assert lanes is None
        assert charges(fleet) == charged
        again = config_of(round_number=2)
        if charged:
            with pytest.raises(PeerError, match="it is spent"):
                open_at(reborn, fleet, again)
        else:
            open_at(reborn, fleet, again)


def test_a_trainer_killed_while_it_books_pays_nothing_and_sent_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()

    def work() -> None:
        dies = "edge_agent.privacy.records.note_round"  # booked and spent, and not committed
        monkeypatch.setattr(dies, lambda *_: os._exit(9))
        session = Session(fleet, config, {name: fleet.sums(name) for name in NAMES})
        session.run(until="mask")

    die_in_child(work)
    with fleet.sums("edge-1") as reborn:
        assert charges(fleet) == 0
        assert ledger(fleet, "SELECT * FROM spent") == []
        assert state_of(fleet, config) == "lost"
        open_at(reborn, fleet, config_of())


def test_the_sessions_of_a_living_process_are_left_alone(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="mask")
    with fleet.sums("edge-1") as other:
        assert state_of(fleet, config) == "masked"
        assert "masked" in refusal(other.answer(config.session, "consent", b""))
    session.consent()
    assert session.reveal().survivors == NAMES


# --- differencing (R8) ---------------------------------------------------------------------------


def statistic(**changes: Any) -> SumConfig:
    return config_of(purpose="statistics", base_digest=None, **changes)


def test_exact_statistics_that_differ_in_one_device_are_not_unmasked(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Session(fleet, statistic(), sums).run()
    without = {name: sums[name] for name in NAMES[:4]}
    # Another run and changed bin edges: still the same data.
    second = Session(fleet, statistic(run_id="run-2", question_digest="7" * 64, **FOUR), without)
    second.run(until="mask")
    question = encode(second.server.close_masking())
    for name in without:
        assert "differ by 1 devices" in refusal(second.ask(name, "consent", question))
        assert state_of(fleet, second.config, name) == "refused"


def test_exact_statistics_over_the_same_devices_may_be_asked_again(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Session(fleet, statistic(), sums).run()
    Session(fleet, statistic(question_digest="7" * 64), sums).run()
    assert charges(fleet) == 2


def test_noised_statistics_may_differ_in_one_device(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    changes: dict[str, Any] = {"purpose": "statistics", "base_digest": None, **FOUR}
    Session(fleet, noised_config_of(**changes), sums).run()
    Session(fleet, noised_config_of(**changes), {name: sums[name] for name in NAMES[:4]}).run()


def test_exact_sums_from_other_parameters_may_differ_in_one_device(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    Session(fleet, config_of(), sums).run()
    four = {name: sums[name] for name in NAMES[:4]}
    Session(fleet, config_of(round_number=2, base_digest="5" * 64, **FOUR), four).run()
    same_again = Session(fleet, config_of(run_id="run-2", **FOUR), four)
    same_again.run(until="mask")
    question = encode(same_again.server.close_masking())
    assert "differ by 1 devices" in refusal(same_again.ask("edge-1", "consent", question))


# --- memory, time and logs -----------------------------------------------------------------------


def test_an_expired_session_is_forgotten_with_its_secrets_and_vector(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    known = sums["edge-1"]._sessions[config.session]
    assert known.vector is not None
    fleet.now = NOW + timedelta(hours=1)
    answer, lanes = sums["edge-1"].mask(config.session, session.questions["edge-1", "mask"])
    assert "expired" in refusal(answer)
    assert lanes is None
    assert known.vector is None
    assert known.client is not None
    assert known.client._secrets is None
    assert state_of(fleet, config) == "expired"


def test_a_vector_is_dropped_when_it_left_and_lanes_when_they_were_unmasked(
    fleet: Fleet, sums: dict[str, SecureSums]
) -> None:
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="mask")
    known = sums["edge-1"]._sessions[config.session]
    assert known.vector is None
    assert known.lanes is not None
    session.consent()
    session.reveal()
    assert known.lanes is None
    answer, lanes = sums["edge-1"].mask(config.session, session.questions["edge-1", "mask"])
    assert refusal(answer) == "the sum was unmasked already"
    assert lanes is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["vector", "exact"])
def test_whether_its_numbers_are_finite_is_told_of_no_single_device(
    fleet: Fleet, device: SecureSums, bad: float, where: str
) -> None:
    config = config_of()
    opened = open_at(device, fleet, config)
    vector, exact = vector_of(0, config), dict(EXAMPLES)
    if where == "vector":
        vector[1] = bad
    else:
        exact = dict.fromkeys(exact, bad)

    assert signed(device.advertise(opened, vector, exact)).refusal == ""

    known = device._sessions[config.session]
    assert known.vector is not None
    assert not known.vector.any()
    assert known.exact == dict.fromkeys(EXAMPLES, 0.0)
    assert state_of(fleet, config) == "advertised"


def test_a_vector_of_another_shape_or_other_exact_values_are_our_own_mistake(
    fleet: Fleet, device: SecureSums
) -> None:
    config = config_of()
    opened = open_at(device, fleet, config)
    with pytest.raises(ValueError, match=r"a vector of \(5,\) for 4 lanes"):
        device.advertise(opened, np.zeros(5, np.float32), EXAMPLES)
    with pytest.raises(ValueError, match="exact values"):
        device.advertise(opened, vector_of(0, config), {"rows": 1.0})


def test_a_device_whose_training_failed_says_no(fleet: Fleet, device: SecureSums) -> None:
    config = config_of()
    opened = open_at(device, fleet, config)
    assert refusal(device.decline(opened, "training diverged")) == "training diverged"
    assert state_of(fleet, config) == "refused"


def test_neither_log_nor_repr_shows_the_vector(
    fleet: Fleet, sums: dict[str, SecureSums], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = config_of()
    session = Session(fleet, config, sums)
    session.run(until="share")
    known = sums["edge-1"]._sessions[config.session]
    assert known.vector is not None
    assert "array(" not in repr(known)
    session.mask()
    session.ask("edge-1", "consent", b"\xc1")
    assert "refused at 'consent'" in caplog.text
    assert "0.1" not in caplog.text
    assert "array(" not in repr(known)


# --- outside any sum -----------------------------------------------------------------------------


def test_an_update_by_itself_leaves_only_with_permission_and_is_booked(
    fleet: Fleet, device: SecureSums
) -> None:
    with pytest.raises(PolicyError, match="individual_updates = false"):
        device.allow_plain_update("run-1", 1, data_of(device))
    write_policy(fleet, "individual_updates = true\nmax_exact_sums = 1")
    device.allow_plain_update("run-1", 1, data_of(device))
    device.allow_plain_update("run-1", 1, dataclasses.replace(data_of(device), part="held-out"))
    booked = ledger(fleet, "SELECT kind, run_id, purpose, part FROM charges ORDER BY number")
    assert booked == [
        ("plain", "run-1", "train", "train"),
        ("plain", "run-1", "evaluate", "held-out"),
    ]
    with pytest.raises(PolicyError, match="max_exact_sums = 1"):
        device.allow_plain_update("run-1", 2, data_of(device))
