"""Attacks on the protocol by a coordinator, a carrier or devices in league with it, replayed.

The coordinator of these tests knows everything that a real one could: all answers, all questions
and its private key. Here nothing stops it from asking what it likes.
"""

import copy
from collections import Counter
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import pytest

from shared.errors import PeerError, QuorumError
from shared.secure_sum.config import (
    ExactLane,
    Noise,
    SumConfig,
    corrupted_of,
    digest_of,
    encode_config,
    threshold_of,
)
from shared.secure_sum.keys import (
    SessionSecrets,
    agree,
    commit_seed,
    commit_share,
    mask_private_key,
    open_sealed_to,
    own_mask_key,
    pair_mask_key,
)
from shared.secure_sum.lifecycle import ClientState, ServerState
from shared.secure_sum.masking import Lanes, apply_masks
from shared.secure_sum.messages import (
    Advertised,
    Boxes,
    Consent,
    Roster,
    RosterEntry,
    Shared,
    SignedAnswer,
    Stage,
    Survivors,
    Unmask,
    dealers_in,
    decode,
    encode,
    share_in,
)
from shared.secure_sum.roster import SumRoster
from shared.secure_sum.rules import bitmap_of, pair_sign, places_in
from tests.unit.shared.secure_sum.whole_sum import (
    EXPIRY,
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
    member_of,
    same,
    take,
)

VICTIM = "device-000"
replace = msgspec.structs.replace


def entry_of(answer: SignedAnswer) -> RosterEntry:
    advertised = decode(answer.body, Advertised)
    return RosterEntry(answer.device_id, advertised.mask_key, advertised.box_key, answer.signature)


# --- forged keys ----------------------------------------------------------------------------------


def test_a_coordinator_that_invents_its_victims_peers_gets_no_share_and_no_vector() -> None:
    whole = WholeSum(6)
    own = entry_of(whole.clients[VICTIM].advertise())
    invented = []
    for device_id in whole.ids[1:]:
        secrets = SessionSecrets.new(Entropy("coordinator", device_id))
        # It has no device's identity, so it signs with a key of its own.
        liar = whole.client(device_id, secrets=secrets)
        liar._identity = identity_of("coordinator")
        invented.append(entry_of(liar.advertise()))
    with pytest.raises(PeerError, match="device-001 did not sign"):
        whole.clients[VICTIM].share(Roster((own, *invented)))
    assert whole.clients[VICTIM].state is ClientState.REFUSED


def test_devices_that_the_membership_list_does_not_name_are_no_peers() -> None:
    whole = WholeSum(6)
    roster = whole.advertise()
    known = {device_id: member_of(device_id) for device_id in whole.ids[:5]}
    client = whole.client(VICTIM)
    client._members = known
    client.advertise()
    with pytest.raises(PeerError, match="device-005 is in the roster but not in the membership"):
        client.share(roster)


# --- another model, question or bound for one device ----------------------------------------------

OTHER: dict[str, Any] = {
    "session": b"t" * 32,
    "fleet": "another",
    "run_id": "run-2",
    "round_number": 4,
    "purpose": "evaluate",
    "group": 1,
    "groups": 2,
    "task_digest": "4" * 64,
    "question_digest": "5" * 64,
    "base_digest": "6" * 64,
    "min_survivors": 3,
    "max_roster": 11,
    "at_least": 2,
    "corrupt_fraction": 0.11,
    "corrupt_devices": 2,
    "drop_fraction": 0.2,
    "threshold": "group",
    "encoding": encoding_of(max_steps=999),
    "exact_lanes": (),
    "noise": None,
    "mask_algorithm": "chacha20",
    "server_key": b"k" * 32,
    "membership_version": 2,
    "expires_at": EXPIRY + timedelta(seconds=1),
}
OTHER_ENCODING: dict[str, Any] = {
    "lane_bits": 32,
    "length": 6,
    "clip_norm": 2.0,
    "steps_per_unit": 999.0,
    "max_steps": 1001,
    "rotation_seed": b"r" * 16,
}
NOISE = Noise(multiplier=1.0, survivors=4)
NOISED = {"noise": NOISE, "exact_lanes": ()}
EXACT = [
    ExactLane(name="other", max_steps=10_000),
    ExactLane(name="examples", max_steps=9_999),
    ExactLane(name="examples", max_steps=10_000, steps_per_unit=2.0),
]
MUTATIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((name, {}, {name: value}) for name, value in OTHER.items() if name != "noise"),
    ("noise", NOISED, {"noise": None}),
    ("noise kind", NOISED, {"noise": replace(NOISE, kind="discrete-gaussian")}),
    ("noise multiplier", NOISED, {"noise": replace(NOISE, multiplier=0.5)}),
    ("noise survivors", NOISED, {"noise": replace(NOISE, survivors=5)}),
    *(
        (f"encoding {name}", {}, {"encoding": encoding_of(**{name: value})})
        for name, value in OTHER_ENCODING.items()
    ),
    *((f"exact lane {number}", {}, {"exact_lanes": (EXACT[number],)}) for number in range(3)),
]


def test_the_mutations_below_leave_no_field_of_a_configuration_out() -> None:
    assert set(OTHER) == set(SumConfig.__struct_fields__) - {"v"}
    assert set(OTHER_ENCODING) == set(encoding_of().__struct_fields__)


@pytest.mark.parametrize(
    ("base", "change"),
    [(base, change) for _, base, change in MUTATIONS],
    ids=[name for name, _, _ in MUTATIONS],
)
def test_one_device_that_was_told_anything_else_ends_the_session_of_all(
    base: dict[str, Any], change: dict[str, Any]
) -> None:
    ours = config_of(**base)
    theirs = msgspec.structs.replace(ours, **change)
    whole = WholeSum(6, config=ours, configs={"device-003": theirs})
    # A lying coordinator does not mind that the odd device's signature is of another session.
    answers = [whole.clients[device_id].advertise() for device_id in whole.ids]
    roster = Roster(tuple(entry_of(answer) for answer in answers))
    for device_id in whole.ids:
        with pytest.raises(PeerError):
            whole.clients[device_id].share(roster)
        assert whole.clients[device_id].state is ClientState.REFUSED


def test_an_honest_coordinator_leaves_the_odd_device_out_and_sums_without_it() -> None:
    other = {"device-003": config_of(base_digest="6" * 64)}
    whole = WholeSum(6, configs=other, tolerant=True)
    result = whole.run()
    assert len(whole.rejected) == 1
    assert "bad signature" in whole.rejected[0]
    assert "device-003" not in result.roster
    assert same(result.lanes, whole.expected(result.survivors))


# --- both shares, lying survivor sets -------------------------------------------------------------


def test_nobody_says_which_shares_to_reveal_and_each_peers_are_of_one_kind() -> None:
    # What flwr's client is asked ("active" and "dead" lists) does not exist in this question.
    assert Unmask.__struct_fields__ == ("survivors", "consents")
    whole = WholeSum(6)
    result = whole.run({"device-004": "mask"})
    shares = shares_of(whole)
    for dealer, kinds in shares.items():
        wanted = "key" if dealer == "device-004" else "seed"
        assert set(kinds) == {wanted}
    assert len(result.survivors) == 5


def shares_of(whole: WholeSum) -> dict[str, Counter[str]]:
    """By dealer: how many shares of which kind the coordinator reads from all it was told.

    It tells the kinds apart as the server does, by the dealers' commitments.
    """
    found: dict[str, Counter[str]] = {}
    commitments = {
        (said.device_id, whole.ids[dealt.to], commitment): kind
        for said in whole.said
        if said.stage == "share"
        for dealt in decode(said.answer.body, Shared).dealt
        for kind, commitment in (
            ("seed", dealt.seed_share_commitment),
            ("key", dealt.key_share_commitment),
        )
    }
    roster = roster_of(whole)
    for said in whole.said:
        if said.stage != "reveal":
            continue
        content = open_sealed_to(
            SERVER_KEY, said.answer.body, associated=roster.revealed_to_server(said.device_id)
        )
        for place in dealers_in(content, len(roster)):
            dealer, share = whole.ids[place], share_in(content, place)
            for kind in ("seed", "key"):
                commitment = commit_share(
                    kind, share, roster.binding, dealer=dealer, receiver=said.device_id
                )
                if commitments.get((dealer, said.device_id, commitment)) == kind:
                    found.setdefault(dealer, Counter())[kind] += 1
    return found


def roster_of(whole: WholeSum) -> SumRoster:
    roster = whole.server._intake.roster
    assert roster is not None
    return roster


def test_a_coordinator_that_tells_two_halves_different_survivors_gets_no_share_at_all() -> None:
    whole = WholeSum(7)
    survivors = whole.mask(whole.run_until("mask"))
    assert places_in(survivors.bitmap, 7) == frozenset(range(7))
    told = {
        device_id: Survivors(bitmap_of(set(range(7)) - {gone}, 7))
        for device_id in whole.ids
        for gone in [6 if device_id < "device-004" else 0]
        if whole.ids[gone] != device_id
    }
    consents: dict[Survivors, list[Consent]] = {}
    for device_id, lie in told.items():
        answer = whole.clients[device_id].consent(lie)
        place = whole.ids.index(device_id)
        consents.setdefault(lie, []).append(Consent(place, answer.signature))
    assert sorted(map(len, consents.values())) == [3, 4]
    for device_id, lie in told.items():
        everything = tuple(consent for some in consents.values() for consent in some)
        for offered in (tuple(consents[lie]), everything):
            client = copy.copy(whole.clients[device_id])
            client._received, client._answered = dict(client._received), dict(client._answered)
            with pytest.raises(PeerError, match=r"signed the survivors|did not sign"):
                client.reveal(Unmask(lie, offered))
            assert client.state is ClientState.REFUSED


def test_a_device_signs_one_set_of_survivors_and_no_second_one() -> None:
    whole = WholeSum(7)
    whole.mask(whole.run_until("mask"))
    client = whole.clients[VICTIM]
    client.consent(Survivors(bitmap_of(range(6), 7)))
    with pytest.raises(PeerError, match="another question"):
        client.consent(Survivors(bitmap_of(range(7), 7)))


# --- claimed aborts, re-runs, replays -------------------------------------------------------------


def test_a_coordinator_that_claims_an_abort_cannot_ask_this_session_for_another_sum() -> None:
    whole = WholeSum(7)
    whole.run()
    boxes = next(said.question for said in whole.said if said.stage == "mask")
    for device_id in whole.ids:
        client = whole.clients[device_id]
        lanes = copy_of(whole.vectors[device_id])
        with pytest.raises(PeerError):
            client.mask(boxes, lanes)  # type: ignore[arg-type]
        assert same(lanes, whole.vectors[device_id])
        with pytest.raises(PeerError):
            client.consent(Survivors(bitmap_of(range(6), 7)))
        with pytest.raises(PeerError):
            client.reveal(Unmask(Survivors(bitmap_of(range(6), 7)), ()))


def other_sessions() -> list[tuple[str, WholeSum]]:
    """The same devices in other sessions, all of them finished."""
    changes: dict[str, dict[str, Any]] = {
        "the same session": {},
        "another session": {"session": b"t" * 32},
        "another round": {"session": b"t" * 32, "round_number": 4},
        "another round, the same session": {"round_number": 4},
        "another run, the same session": {"run_id": "run-2"},
    }
    recorded = []
    for name, change in changes.items():
        # The devices' keys are fresh in every session.
        whole = WholeSum(6, config=config_of(**change), seed=name)
        whole.run({"device-004": "mask"})
        recorded.append((name, whole))
    return recorded


@pytest.mark.parametrize("stage", STAGES)
def test_no_recorded_answer_counts_at_another_stage_or_in_another_session(stage: Stage) -> None:
    for name, other in other_sessions():
        whole = WholeSum(6)
        question = whole.run_until(stage)
        for said in other.said:
            if name == "the same session" and stage == said.stage == "advertise":
                continue  # nothing is there yet that it could belong to: it is the device's word
            # At its own stage, and moved to the one that is open.
            for at in {said.stage, stage}:
                for answer in (said.answer, replace(said.answer, session=b"s" * 32, stage=stage)):
                    moved = Said(at, said.device_id, None, answer, said.lanes or fresh_lanes())
                    try:
                        counted = take(whole.server, moved)
                    except PeerError:
                        counted = False
                    assert not counted
        assert whole.server.blamed == ()
        assert not whole.server.left
        rest = STAGES[STAGES.index(stage) :]
        for later in rest:
            question = whole.advertise() if later == "advertise" else whole._stage(later, question)
        assert same(question.lanes, whole.expected(question.survivors))


def fresh_lanes() -> Lanes:
    return Lanes(np.zeros(5, np.uint16), np.zeros(1, np.uint64))


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_no_answer_of_this_session_counts_at_another_of_its_stages(stage: Stage) -> None:
    whole = WholeSum(6)
    whole.run_until(stage)
    recorded = list(whole.said)
    for said in recorded:
        for at in STAGES:
            moved = Said(at, said.device_id, None, said.answer, said.lanes or fresh_lanes())
            try:
                assert not take(whole.server, moved)
            except PeerError:
                continue
    assert whole.server.blamed == ()


def questions_of(whole: WholeSum) -> dict[Stage, Any]:
    return {said.stage: said.question for said in whole.said if said.device_id == VICTIM}


@pytest.mark.parametrize("stage", ["share", "reveal"])
def test_a_recorded_roster_or_unmasking_of_another_session_is_refused(stage: Stage) -> None:
    for _, other in other_sessions():
        whole = WholeSum(6)
        if stage == "reveal":
            whole.consent(whole.mask(whole.run_until("mask"), ["device-004"]))
        else:
            whole.advertise()
        with pytest.raises(PeerError):
            ask(whole.clients[VICTIM], stage, questions_of(other)[stage])
        assert whole.clients[VICTIM].state is ClientState.REFUSED


def test_recorded_boxes_of_another_session_hold_nothing_that_is_ever_revealed() -> None:
    for _, other in other_sessions():
        whole = WholeSum(6)
        boxes: dict[str, Boxes] = whole.run_until("mask")
        boxes[VICTIM] = questions_of(other)["mask"]
        whole.mask(boxes)
        assert whole.clients[VICTIM]._received == {}


# --- late devices, colluding devices --------------------------------------------------------------


def uniform(lanes: Lanes) -> bool:
    """Chi-square of the bytes against the uniform distribution, at about 6 standard deviations."""
    content = np.concatenate([lanes.main.view(np.uint8), lanes.exact.view(np.uint8)])
    expected = content.size / 256
    observed = np.bincount(content, minlength=256)
    return bool(abs(((observed - expected) ** 2 / expected).sum() - 255) < 6 * np.sqrt(2 * 255))


def test_a_late_vector_stays_hidden_from_who_knows_its_key_and_all_others_secrets() -> None:
    config = config_of(encoding=encoding_of(length=100_000), exact_lanes=())
    whole = WholeSum(6, config=config)
    late = "device-003"
    vector = whole.vectors[late]
    vector.main[:] = 0  # what a coordinator would love to recognise
    boxes = whole.run_until("mask")
    secrets = {who: whole.clients[who]._secrets for who in whole.ids}
    key_seed, mask_seed = bytes(secrets[late].key_seed), bytes(secrets[late].mask_seed)  # type: ignore[union-attr]
    lanes = copy_of(vector)
    answer = whole.clients[late].mask(boxes[late], lanes)
    result = whole.reveal(whole.consent(whole.mask(boxes, [late])))
    assert late not in result.survivors
    assert same(result.lanes, whole.expected(result.survivors))
    # The vector arrives after all: it is not read, and if somebody kept it:
    assert not whole.server.take_masked(answer, lanes)
    assert uniform(lanes)
    roster, place = roster_of(whole), whole.ids.index(late)
    private = mask_private_key(key_seed)  # rebuilt, as it was to unmask the others' sum
    masks = []
    for peer, entry in enumerate(roster.entries):
        if peer != place:
            low, high = sorted((late, entry.device_id))
            secret = agree(private, entry.mask_key)
            key = pair_mask_key(secret, roster.binding, low, high, "aes-128-ctr")
            masks.append((key, pair_sign(peer, place)))
    apply_masks(lanes, masks, "aes-128-ctr")
    assert uniform(lanes)  # its own mask is still there, of a seed that nobody revealed
    own = own_mask_key(mask_seed, roster.binding, late, "aes-128-ctr")
    apply_masks(lanes, [(own, -1)], "aes-128-ctr")
    assert not lanes.main.any()  # and that seed was all that hid it
    assert not uniform(lanes)


@pytest.mark.parametrize("dropped", [None, "device-005"])
def test_a_coordinator_in_league_with_c_devices_never_has_both_secrets_of_another(
    dropped: str | None,
) -> None:
    config = config_of(corrupt_devices=2)
    whole = WholeSum(9, config=config)
    whole.run({dropped: "mask"} if dropped else {})
    corrupted = whole.ids[:2]
    assert corrupted_of(config, 9) == 2
    for dealer, kinds in shares_of(whole).items():
        if dealer in corrupted:
            continue
        # Its accomplices know both of their shares; what they revealed is counted already.
        known = {kind: kinds[kind] + (0 if kinds[kind] else 2) for kind in ("seed", "key")}
        assert min(known.values()) < threshold_of(config, 9) <= max(known.values())


def test_masked_vectors_look_the_same_whatever_is_in_them() -> None:
    config = config_of(encoding=encoding_of(length=100_000), exact_lanes=())
    whole = WholeSum(5, config=config)
    for number, lanes in enumerate(whole.vectors.values()):
        lanes.main[:] = number % 2  # constant vectors, two kinds
    whole.mask(whole.run_until("mask"))
    masked = [said.lanes for said in whole.said if said.lanes is not None]
    assert len(masked) == 5
    assert all(uniform(lanes) for lanes in masked)
    assert any(0xFFFF in lanes.main for lanes in masked)  # flwr's masks leave the last value out


# --- ends without a sum ---------------------------------------------------------------------------


def test_beyond_the_tolerance_there_is_no_sum_and_nothing_to_make_one_of() -> None:
    whole = WholeSum(7)  # may lose two
    boxes = whole.run_until("mask")
    with pytest.raises(QuorumError, match="4 of the 5 vectors"):
        whole.mask(boxes, whole.ids[4:])
    assert whole.server.state is ServerState.ABORTED
    assert whole.server._sum is None
    # A coordinator that goes on all the same is refused by everybody who is left.
    survivors = Survivors(bitmap_of(range(4), 7))
    for device_id in whole.ids[:4]:
        with pytest.raises(PeerError, match="4 survivors, of the 5"):
            whole.clients[device_id].consent(survivors)
        assert whole.clients[device_id].state is ClientState.REFUSED
        assert whole.clients[device_id]._received == {}


def test_all_living_devices_say_as_much_at_each_stage() -> None:
    whole = WholeSum(8)
    whole.run({"device-003": "mask"})
    for stage in STAGES:
        sizes = {len(encode(said.answer)) for said in whole.said if said.stage == stage}
        assert len(sizes) == 1, stage


def test_the_seed_commitment_is_checked_by_what_everybody_can_compute() -> None:
    whole = WholeSum(5)
    roster = whole.advertise()
    seed = bytes(whole.clients[VICTIM]._secrets.mask_seed)  # type: ignore[union-attr]
    answer = whole.clients[VICTIM].share(roster)
    binding = SumRoster.of(whole.config, digest_of(encode_config(whole.config)), roster).binding
    committed = decode(answer.body, Shared).seed_commitment
    assert committed == commit_seed(seed, binding, VICTIM)
