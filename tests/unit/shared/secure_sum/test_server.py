from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from shared.errors import (
    ConfigError,
    IllegalTransitionError,
    PeerError,
    QuorumError,
    UnavailableError,
)
from shared.secure_sum.keys import SessionSecrets, open_sealed_to, seal_to
from shared.secure_sum.lifecycle import ServerState
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import (
    Advertised,
    Masked,
    Shared,
    SignedAnswer,
    Stage,
    Struct,
    Survivors,
    dealers_in,
    decode,
    encode,
    join_shares,
    share_in,
    sign_answer,
)
from shared.secure_sum.server import SumResult, SumServer
from tests.unit.shared.secure_sum.whole_sum import (
    SERVER_KEY,
    STAGES,
    Entropy,
    Said,
    WholeSum,
    ask,
    config_of,
    copy_of,
    encoding_of,
    identity_of,
    same,
    take,
)

replace = msgspec.structs.replace
LIAR = "device-002"


def signed_anew(whole: WholeSum, answer: SignedAnswer, body: bytes) -> SignedAnswer:
    """What a corrupted device says instead, with its own signature."""
    roster = whole.server._intake.roster
    return sign_answer(
        identity_of(answer.device_id),
        session=answer.session,
        stage=answer.stage,
        config_digest=whole.digest,
        roster_digest=roster.digest if roster else b"",
        device_id=answer.device_id,
        body=body,
    )


def lying(
    whole: WholeSum, stage: Stage, change: Callable[[Any], Struct], kind: type[Struct]
) -> None:
    """Let one device say something else at one stage."""

    def alter(said: Said) -> Said:
        if (said.stage, said.device_id) != (stage, LIAR):
            return said
        body = encode(change(decode(said.answer.body, kind)))
        answer = signed_anew(whole, said.answer, body)
        return Said(said.stage, said.device_id, said.question, answer, said.lanes)

    whole.alter = alter


def lying_at_the_end(whole: WholeSum, change: Callable[[bytes], bytes]) -> None:
    def alter(said: Said) -> Said:
        if (said.stage, said.device_id) != ("reveal", LIAR):
            return said
        roster = whole.server._intake.roster
        assert roster is not None
        bound = roster.revealed_to_server(LIAR)
        content = open_sealed_to(SERVER_KEY, said.answer.body, associated=bound)
        sealed = seal_to(whole.config.server_key, change(content), associated=bound)
        answer = signed_anew(whole, said.answer, sealed)
        return Said(said.stage, said.device_id, said.question, answer)

    whole.alter = alter


def spoil(slots: bytes, share: bytes, count: int) -> bytes:
    """Replace the first ``count`` shares."""
    dealers = sorted(dealers_in(slots, len(slots) // 32))
    shares = {dealer: share_in(slots, dealer) for dealer in dealers}
    shares |= dict.fromkeys(dealers[:count], share)
    return join_shares(shares, roster_size=len(slots) // 32)


def run_with_a_reject(whole: WholeSum, message: str) -> SumResult:
    """Run the session; the liar's answer is refused, and the others go on."""
    result = whole.run()
    assert len(whole.rejected) == 1
    assert message in whole.rejected[0]
    return result


NONSENSE: list[tuple[Stage, type[Struct], Callable[[Any], Struct], str]] = [
    ("advertise", Advertised, lambda a: Advertised(a.mask_key, a.mask_key), "there already"),
    ("advertise", Advertised, lambda a: Advertised(a.mask_key, bytes(32)), "could compute with"),
    ("share", Shared, lambda s: Shared(s.seed_commitment, s.dealt[:-1]), "one share to each peer"),
    ("share", Shared, lambda s: Shared(s.seed_commitment, s.dealt[::-1]), "one share to each"),
    ("share", Shared, lambda s: Shared(s.seed_commitment, (*s.dealt, s.dealt[0])), "one share"),
    ("share", Shared, lambda _: Survivors(b"\x01"), "no Shared"),
    ("mask", Masked, lambda m: Masked(m.lanes_digest, (0, 0)), "complained"),
    ("mask", Masked, lambda m: Masked(m.lanes_digest, (2,)), "complained"),
    ("mask", Masked, lambda m: Masked(m.lanes_digest, (9,)), "complained"),
    ("consent", Survivors, lambda _: Survivors(b"\x7f"), "other survivors"),
]


@pytest.mark.parametrize(("stage", "kind", "change", "message"), NONSENSE)
def test_who_signs_nonsense_is_out_by_name_and_the_others_sum_on(
    stage: Stage, kind: type[Struct], change: Callable[[Any], Struct], message: str
) -> None:
    whole = WholeSum(8, tolerant=True)
    lying(whole, stage, change, kind)
    result = run_with_a_reject(whole, message)
    assert [blame.device_id for blame in result.blamed] == [LIAR]
    assert LIAR in whole.server.left
    assert same(result.lanes, whole.expected(result.survivors))
    assert (LIAR in result.survivors) == (stage == "consent")


def test_who_signs_a_vector_of_another_length_is_out_by_name() -> None:
    whole = WholeSum(8, tolerant=True)
    short = Lanes(np.zeros(4, np.uint16), np.zeros(1, np.uint64))

    def alter(said: Said) -> Said:
        if (said.stage, said.device_id) != ("mask", LIAR):
            return said
        answer = signed_anew(whole, said.answer, encode(Masked(short.digest())))
        return Said(said.stage, said.device_id, said.question, answer, short)

    whole.alter = alter
    result = run_with_a_reject(whole, "another type or length")
    assert same(result.lanes, whole.expected(result.survivors))
    assert [blame.device_id for blame in result.blamed] == [LIAR]


END_LIES: list[Callable[[bytes], bytes]] = [
    lambda slots: slots[:-32],
    lambda slots: slots + slots[:32],
    lambda slots: bytes(32) + slots[32:],  # none of the first
    lambda slots: slots[::-1],  # one of its own
    lambda _: b"",
]


@pytest.mark.parametrize("change", END_LIES)
def test_who_reveals_other_than_one_share_of_each_peer_is_out_by_name(
    change: Callable[[bytes], bytes],
) -> None:
    whole = WholeSum(8, tolerant=True)
    lying_at_the_end(whole, change)
    result = run_with_a_reject(whole, "did not reveal one share of each peer")
    assert [blame.device_id for blame in result.blamed] == [LIAR]
    assert same(result.lanes, whole.expected(result.survivors))


@pytest.mark.parametrize("share", [b"\xff" * 32, b"\x11" * 32])
@pytest.mark.parametrize("spoilt", [1, 7])
def test_who_reveals_bad_shares_is_named_and_the_sum_is_exact_without_it(
    share: bytes, spoilt: int
) -> None:
    whole = WholeSum(8)
    lying_at_the_end(whole, lambda slots: spoil(slots, share, spoilt))
    result = whole.run({"device-006": "mask"})
    assert [blame.device_id for blame in result.blamed] == [LIAR]
    assert "another share than" in result.blamed[0].cause
    assert same(result.lanes, whole.expected(result.survivors))


def test_a_bad_share_keeps_the_session_waiting_for_a_good_one_in_its_stead() -> None:
    whole = WholeSum(8)  # t = 5: six who reveal are enough, if none of them lies
    lying_at_the_end(whole, lambda slots: spoil(slots, b"\x11" * 32, 7))
    unmask, enough = whole.run_until("reveal"), []
    for device_id in whole.ids:
        whole._deliver("reveal", device_id, unmask, whole.clients[device_id].reveal(unmask))
        enough.append(whole.server.enough_revealed)
    assert enough == [False] * 6 + [True] * 2
    assert [blame.device_id for blame in whole.server.blamed] == [LIAR]
    result = whole.server.finish()
    assert same(result.lanes, whole.expected(result.survivors))


def test_too_many_bad_shares_end_in_no_sum_and_the_liars_names() -> None:
    whole = WholeSum(8)
    lying_at_the_end(whole, lambda slots: spoil(slots, b"1" * 32, 7))
    with pytest.raises(QuorumError, match="4 of the 5 shares of device-0"):
        whole.run({"device-003": "reveal", "device-004": "reveal"})
    assert whole.server.state is ServerState.ABORTED
    assert [blame.device_id for blame in whole.server.blamed] == [LIAR]


def deal_another_key(whole: WholeSum) -> None:
    """One device deals shares of another key than the one that it advertised."""
    secrets = SessionSecrets.new(Entropy("liar"))
    whole.clients[LIAR] = whole.client(LIAR, secrets=secrets)
    advertise = whole.clients[LIAR].advertise

    def lie() -> SignedAnswer:
        answer = advertise()
        secrets.key_seed[:] = bytes(31)
        return answer

    whole.clients[LIAR].advertise = lie  # type: ignore[method-assign]


def test_a_dropped_device_that_dealt_another_key_than_its_own_is_named_and_there_is_no_sum() -> (
    None
):
    whole = WholeSum(8)
    deal_another_key(whole)
    with pytest.raises(PeerError, match="device-002 dealt shares that do not rebuild the key"):
        whole.run({LIAR: "mask"})
    assert whole.server.state is ServerState.ABORTED
    assert whole.server.cause.startswith("device-002 dealt shares")
    assert [blame.device_id for blame in whole.server.blamed] == [LIAR]


def test_a_survivor_that_committed_to_another_seed_is_named_and_there_is_no_sum() -> None:
    whole = WholeSum(8)
    lying(whole, "share", lambda s: Shared(b"x" * 32, s.dealt), Shared)
    with pytest.raises(PeerError, match="device-002 dealt shares that do not rebuild the seed"):
        whole.run()
    assert [blame.device_id for blame in whole.server.blamed] == [LIAR]


def test_a_device_whose_boxes_nobody_can_open_is_named_and_there_is_no_sum() -> None:
    whole = WholeSum(8)

    def change(shared: Shared) -> Shared:
        spoilt = tuple(replace(dealt, box=b"x" * 80) for dealt in shared.dealt)
        return Shared(shared.seed_commitment, spoilt)

    lying(whole, "share", change, Shared)
    with pytest.raises(QuorumError, match="0 of the 5 shares of device-002"):
        whole.run()
    assert [blame.device_id for blame in whole.server.blamed] == [LIAR]
    assert "7 could not be used" in whole.server.blamed[0].cause


@pytest.mark.parametrize(
    ("bad", "dropped", "named"),
    [(1, ["device-007"], [LIAR, "device-000"]), (2, [], [LIAR])],  # c is 1: who lies of two is open
)
def test_a_few_bad_boxes_cost_no_sum(bad: int, dropped: list[str], named: list[str]) -> None:
    whole = WholeSum(8)

    def change(shared: Shared) -> Shared:
        spoilt = tuple(replace(dealt, box=b"x" * 80) for dealt in shared.dealt[:bad])
        return Shared(shared.seed_commitment, spoilt + shared.dealt[bad:])

    lying(whole, "share", change, Shared)
    result = whole.run(dict.fromkeys(dropped, "mask"))
    assert same(result.lanes, whole.expected(result.survivors))
    assert [blame.device_id for blame in result.blamed] == named


def test_who_complains_of_everybody_is_blamed_itself() -> None:
    whole = WholeSum(8)
    lying(whole, "mask", lambda m: Masked(m.lanes_digest, (0, 1, 3, 4)), Masked)
    survivors = whole.mask(whole.run_until("mask"))
    assert survivors == Survivors(b"\xff")
    assert [blame.device_id for blame in whole.server.blamed] == [LIAR]


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_that_comes_twice_counts_once_and_another_one_is_refused(stage: Stage) -> None:
    whole = WholeSum(6)
    question = whole.run_until(stage)
    ours = question["device-000"] if stage == "mask" else question
    lanes = copy_of(whole.vectors["device-000"])
    said = Said(
        stage, "device-000", ours, ask(whole.clients["device-000"], stage, ours, lanes), lanes
    )
    assert take(whole.server, said)
    assert "device-000" not in whole.server.waiting_for
    total = whole.server._sum.main.copy() if whole.server._sum else None

    again = decode(encode(said.answer), SignedAnswer)
    assert not take(whole.server, Said(stage, "device-000", ours, again, lanes))
    other = signed_anew(whole, said.answer, said.answer.body[:-1] + b"\x00")
    with pytest.raises(PeerError, match="two different answers"):
        take(whole.server, Said(stage, "device-000", ours, other, lanes))
    assert whole.server.blamed == ()
    if whole.server._sum is not None:
        assert total is not None
        assert (whole.server._sum.main == total).all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_late_answer_is_not_even_read(stage: Stage) -> None:
    whole = WholeSum(6)
    question = whole.run_until(stage)
    ours = question["device-005"] if stage == "mask" else question
    lanes = copy_of(whole.vectors["device-005"])
    late = ask(whole.clients["device-005"], stage, ours, lanes)
    getattr(whole, stage)(*([question] if question else []), ["device-005"])
    unreadable = replace(late, body=b"", signature=b"x" * 64, device_id="nobody")
    for answer in (late, unreadable):
        assert not take(whole.server, Said(stage, "device-005", ours, answer, lanes))


@pytest.mark.parametrize("stage", STAGES)
def test_a_refusal_is_heard_and_nobody_waits_any_longer(stage: Stage) -> None:
    whole = WholeSum(8)
    question = whole.run_until(stage)
    refusal = whole.clients[LIAR].refuse(stage, "the owner said no")
    lanes = whole.vectors[LIAR]
    assert not take(whole.server, Said(stage, LIAR, question, refusal, lanes))
    assert LIAR not in whole.server.waiting_for
    assert whole.server.left[LIAR] == "refused: the owner said no"
    assert whole.server.blamed == ()


@pytest.mark.parametrize("change", ["signature", "body", "refusal", "device_id", "session"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_that_was_altered_on_the_way_changes_nothing(stage: Stage, change: str) -> None:
    whole = WholeSum(6)
    question = whole.run_until(stage)
    ours = question["device-000"] if stage == "mask" else question
    lanes = copy_of(whole.vectors["device-000"])
    answer = ask(whole.clients["device-000"], stage, ours, lanes)
    changes: dict[str, dict[str, Any]] = {
        "signature": {"signature": b"x" * 64},
        "body": {"body": answer.body[:-1] + bytes([answer.body[-1] ^ 1])},
        "refusal": {"refusal": "no"},
        "device_id": {"device_id": "device-001"},
        "session": {"session": b"t" * 32},
    }
    before = whole.server.waiting_for
    with pytest.raises(PeerError):
        take(
            whole.server, Said(stage, "device-000", ours, replace(answer, **changes[change]), lanes)
        )
    assert whole.server.waiting_for == before
    assert whole.server.blamed == ()
    assert take(whole.server, Said(stage, "device-000", ours, answer, lanes))


def test_lanes_that_were_altered_on_the_way_change_nothing() -> None:
    whole = WholeSum(6)
    boxes, lanes = whole.run_until("mask"), copy_of(whole.vectors["device-000"])
    answer = whole.clients["device-000"].mask(boxes["device-000"], lanes)
    garbled = copy_of(lanes)
    garbled.main[0] += 1
    with pytest.raises(PeerError, match="another vector"):
        whole.server.take_masked(answer, garbled)
    assert "device-000" in whole.server.waiting_for
    assert whole.server.take_masked(answer, lanes)


def test_who_is_not_asked_cannot_answer() -> None:
    whole = WholeSum(6)
    outsider = whole.client("device-005")
    server = SumServer(
        whole.config,
        whole.digest,
        members=whole.members,
        server_key=SERVER_KEY,
        invited=whole.ids[:5],
    )
    assert server.waiting_for == frozenset(whole.ids[:5])
    with pytest.raises(PeerError, match="device-005 is not asked"):
        server.take_advertised(outsider.advertise())


def test_an_answer_to_a_stage_that_is_not_open_yet_is_refused() -> None:
    whole, ahead = WholeSum(5), WholeSum(5)
    roster = ahead.advertise()
    with pytest.raises(PeerError, match="not open yet"):
        whole.server.take_shared(ahead.clients["device-000"].share(roster))


def test_too_few_devices_are_told_how_many_would_do() -> None:
    with pytest.raises(QuorumError, match="round 3 has 4 of the 5 devices") as caught:
        WholeSum(4).advertise()
    assert (caught.value.survivors, caught.value.quorum) == (4, 5)


def test_a_configuration_that_no_roster_can_meet_asks_a_person_to_change_it() -> None:
    whole = WholeSum(4, config=config_of(max_roster=4, drop_fraction=0.45))
    with pytest.raises(ConfigError, match="lower drop_fraction"):
        whole.advertise()
    assert whole.server.state is ServerState.ABORTED


@pytest.mark.parametrize("state", STAGES)
def test_a_session_that_was_given_up_takes_nothing_and_keeps_nothing(state: Stage) -> None:
    whole = WholeSum(5)
    whole.run_until(state)
    whole.server.abort("the round was stopped")
    assert whole.server.state is ServerState.ABORTED
    assert whole.server.cause == "the round was stopped"
    assert whole.server.waiting_for == frozenset()
    assert whole.server._sum is None
    assert whole.server._memory.server_key == b""
    for close in ("advertising", "sharing", "masking", "consent"):
        with pytest.raises(IllegalTransitionError):
            getattr(whole.server, f"close_{close}")()
    with pytest.raises(IllegalTransitionError):
        whole.server.finish()


def restored(whole: WholeSum) -> None:
    whole.server = SumServer.restore(whole.server.snapshot())


def test_a_crash_while_vectors_arrive_costs_only_those_that_were_not_there_yet() -> None:
    whole = WholeSum(8)
    boxes = whole.run_until("mask")
    for number, device_id in enumerate(whole.ids[:6]):
        if number in (0, 3, 5):
            restored(whole)
        lanes = copy_of(whole.vectors[device_id])
        answer = whole.clients[device_id].mask(boxes[device_id], lanes)
        whole._deliver("mask", device_id, boxes[device_id], answer, lanes)
    restored(whole)
    assert whole.server.waiting_for == {"device-006", "device-007"}
    survivors = whole.server.close_masking()
    result = whole.reveal(whole.consent(survivors))
    assert same(result.lanes, whole.expected(whole.ids[:6]))


def test_a_crash_at_any_later_moment_changes_no_question_and_not_the_sum() -> None:
    whole = WholeSum(8)
    survivors = whole.mask(whole.run_until("mask"), ["device-001"])
    for device_id in sorted(whole.server.waiting_for):
        restored(whole)
        assert whole.server.question() == survivors
        whole._deliver("consent", device_id, None, whole.clients[device_id].consent(survivors))
    unmask = whole.server.close_consent()
    for device_id in sorted(whole.server.waiting_for):
        restored(whole)
        assert whole.server.question() == unmask
        whole._deliver("reveal", device_id, None, whole.clients[device_id].reveal(unmask))
    restored(whole)
    assert whole.server.waiting_for == frozenset()
    result = whole.server.finish()
    assert same(result.lanes, whole.expected(result.survivors))
    assert len(result.survivors) == 7


def test_an_answer_that_was_taken_before_the_crash_may_come_again_after_it() -> None:
    whole = WholeSum(6)
    boxes, lanes = whole.run_until("mask"), copy_of(whole.vectors["device-000"])
    answer = whole.clients["device-000"].mask(boxes["device-000"], lanes)
    assert whole.server.take_masked(answer, lanes)
    restored(whole)
    assert not whole.server.take_masked(answer, lanes)


@pytest.mark.parametrize("stage", ["advertise", "share", "over"])
def test_there_is_no_snapshot_without_a_sum(stage: str) -> None:
    whole = WholeSum(5)
    if stage == "over":
        whole.run()
    else:
        whole.run_until(stage)  # type: ignore[arg-type]
    with pytest.raises(IllegalTransitionError, match="no snapshot"):
        whole.server.snapshot()


@pytest.mark.parametrize("damage", [b"", b"\x80", b"not one", b"\xc1" * 100])
def test_a_damaged_snapshot_is_said_to_be_one(damage: bytes) -> None:
    with pytest.raises(UnavailableError, match="start a new round"):
        SumServer.restore(damage)


def test_a_snapshot_holds_no_single_devices_vector_not_even_a_masked_one() -> None:
    whole = WholeSum(5, config=config_of(encoding=encoding_of(length=50)))
    boxes = whole.run_until("mask")
    whole.mask(boxes)
    snapshot = whole.server.snapshot()
    masked = [said.lanes for said in whole.said if said.stage == "mask"]
    assert len(masked) == 5
    for lanes in [*masked, *whole.vectors.values()]:
        assert lanes is not None
        assert lanes.main.tobytes() not in snapshot


def test_what_the_coordinator_shows_of_itself_has_no_secret() -> None:
    whole = WholeSum(5)
    whole.run_until("consent")
    shown = repr(whole.server) + repr(whole.server._memory)
    assert repr(whole.server) == "SumServer(state='agreeing', out=5)"
    assert repr(SERVER_KEY.private_bytes_raw()) not in shown
