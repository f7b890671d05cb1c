import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import pytest

from shared.errors import PeerError, PolicyError
from shared.membership import Member
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import digest_of, encode_config
from shared.secure_sum.keys import SessionSecrets
from shared.secure_sum.lifecycle import ClientState
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import (
    Boxes,
    Consent,
    Masked,
    Roster,
    RosterEntry,
    Shared,
    Stage,
    Survivors,
    Unmask,
    check_answer,
    decode,
    encode,
)
from shared.secure_sum.rules import bitmap_of
from tests.unit.shared.secure_sum.whole_sum import (
    EXPIRY,
    STAGES,
    Entropy,
    WholeSum,
    ask,
    config_of,
    copy_of,
    encoding_of,
    identity_of,
    member_of,
    same,
)

replace = msgspec.structs.replace


def secrets_of(client: SumClient) -> SessionSecrets:
    assert client._secrets is not None
    return client._secrets


def is_wiped(client: SumClient) -> bool:
    return client._secrets is None and not client._received and not client._box_secrets


def entry(roster: Roster, place: int, **changes: Any) -> Roster:
    entries = list(roster.entries)
    entries[place] = replace(entries[place], **changes)
    return Roster(tuple(entries))


def stranger(roster: Roster) -> RosterEntry:
    return replace(roster.entries[-1], device_id="zzz", mask_key=b"x" * 32, box_key=b"y" * 32)


def refuses(client: SumClient, stage: Stage, question: Any, message: str) -> None:
    """The question ends the session; nothing is said and nothing kept."""
    seeds = (
        [bytes(client._secrets.mask_seed), bytes(client._secrets.key_seed)]
        if (client._secrets)
        else []
    )
    with pytest.raises(PeerError, match=message) as caught:
        ask(client, stage, question, Lanes(np.zeros(5, np.uint16), np.zeros(1, np.uint64)))
    assert client.state is ClientState.REFUSED
    assert is_wiped(client)
    text = f"{caught.value!r} {caught.value.__cause__!r} {client!r}"
    assert not [seed for seed in seeds if seed.hex() in text or repr(seed) in text]


ROSTER_LIES: list[tuple[str, Callable[[Roster], Roster], str]] = [
    ("unsorted", lambda r: Roster(r.entries[::-1]), "not sorted"),
    ("twice the same", lambda r: Roster((r.entries[0], *r.entries)), "not sorted"),
    ("two keys the same", lambda r: entry(r, 1, box_key=r.entries[2].box_key), "are the same"),
    ("one key for both", lambda r: entry(r, 1, box_key=r.entries[1].mask_key), "are the same"),
    ("a stranger", lambda r: Roster((*r.entries, stranger(r))), "not in the membership list"),
    ("a forged mask key", lambda r: entry(r, 3, mask_key=b"x" * 32), "device-003 did not sign"),
    ("a forged box key", lambda r: entry(r, 3, box_key=b"x" * 32), "device-003 did not sign"),
    ("a forged signature", lambda r: entry(r, 3, signature=b"x" * 64), "device-003 did not sign"),
    ("too few", lambda r: Roster(r.entries[:2]), "still reach"),
    ("nobody", lambda _: Roster(()), "0 devices are fewer"),
    ("without us", lambda r: Roster(r.entries[1:]), "device-000 is not in the roster"),
    ("swapped keys of ours", lambda r: entry(r, 0, mask_key=b"x" * 32), "device-000 did not sign"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [(change, message) for _, change, message in ROSTER_LIES],
    ids=[name for name, _, _ in ROSTER_LIES],
)
def test_a_roster_with_one_thing_wrong_ends_the_session(
    change: Callable[[Roster], Roster], message: str
) -> None:
    whole = WholeSum(6, config=config_of(drop_fraction=0.2))
    refuses(whole.clients["device-000"], "share", change(whole.advertise()), message)


def test_older_keys_of_ours_in_the_roster_end_the_session_though_we_signed_them() -> None:
    whole = WholeSum(5)
    roster = whole.advertise()
    again = whole.client("device-000", seed="another life")
    again.advertise()
    refuses(again, "share", roster, "other keys than ours")


def test_a_roster_smaller_than_the_configuration_asks_ends_the_session() -> None:
    whole = WholeSum(5)
    roster = whole.advertise()
    strict = whole.client("device-000", config_of(min_survivors=6))
    strict.advertise()
    refuses(strict, "share", roster, "5 devices are fewer than the 6")


def test_a_roster_that_the_owner_does_not_accept_ends_the_session_with_the_owners_reason() -> None:
    whole = WholeSum(5)
    seen: list[Sequence[Member]] = []

    def check(members: Sequence[Member]) -> None:
        seen.append(members)
        raise PolicyError("too few of these are old friends")

    client = whole.client("device-002", check_roster=check)
    whole.clients["device-002"] = client
    roster = whole.advertise()
    with pytest.raises(PolicyError, match="old friends"):
        client.share(roster)
    assert seen == [[member_of(device_id) for device_id in whole.ids]]
    assert client.state is ClientState.REFUSED
    assert is_wiped(client)


def test_a_peer_whose_key_gives_a_secret_that_everybody_knows_ends_the_session() -> None:
    whole = WholeSum(5)
    weak = SessionSecrets.new(Entropy("weak"))
    weak.box_public = bytes(32)  # a point of small order
    whole.clients["device-004"] = whole.client("device-004", secrets=weak)
    answers = [whole.clients[device_id].advertise() for device_id in whole.ids]
    entries = []
    for answer in answers:
        mask_key, box_key = msgspec.msgpack.decode(answer.body)
        entries.append(RosterEntry(answer.device_id, mask_key, box_key, answer.signature))
    refuses(whole.clients["device-000"], "share", Roster(tuple(entries)), "unusable")


def test_shares_are_dealt_to_all_peers_and_none_to_oneself() -> None:
    whole = WholeSum(5)
    shared = decode(whole.clients["device-002"].share(whole.advertise()).body, Shared)
    assert [dealt.to for dealt in shared.dealt] == [0, 1, 3, 4]
    assert len({dealt.box for dealt in shared.dealt}) == 4


BOX_LIES: list[tuple[str, Callable[[Boxes], Boxes], str]] = [
    ("two of one dealer", lambda b: Boxes((*b.boxes, b.boxes[0])), "more than one box"),
    ("one of our own", lambda b: Boxes((*b.boxes, replace(b.boxes[0], dealer=0))), "of our own"),
    ("of nobody", lambda b: Boxes((*b.boxes, replace(b.boxes[0], dealer=9))), "not in the roster"),
    ("too few", lambda b: Boxes(b.boxes[:-2]), "4 devices dealt shares, of the 5"),
    ("none", lambda _: Boxes(()), "1 devices dealt shares"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [(change, message) for _, change, message in BOX_LIES],
    ids=[name for name, _, _ in BOX_LIES],
)
def test_boxes_with_one_thing_wrong_end_the_session_and_the_vector_stays(
    change: Callable[[Boxes], Boxes], message: str
) -> None:
    whole = WholeSum(6)
    boxes = whole.run_until("mask")
    refuses(whole.clients["device-000"], "mask", change(boxes["device-000"]), message)


@pytest.mark.parametrize("part", ["box", "seed_share_commitment", "key_share_commitment"])
def test_a_bad_box_is_left_out_and_reported_and_its_dealer_stays_in_the_mask(part: str) -> None:
    whole = WholeSum(6)
    boxes = whole.run_until("mask")
    spoilt = list(boxes["device-000"].boxes)
    content = getattr(spoilt[2], part)
    spoilt[2] = replace(spoilt[2], **{part: bytes([content[0] ^ 1]) + content[1:]})
    boxes["device-000"] = Boxes(tuple(spoilt))

    result = whole.reveal(whole.consent(whole.mask(boxes)))

    said = next(said for said in whole.said if said.stage == "mask")
    masked = decode(said.answer.body, Masked)
    assert masked.bad_boxes == (3,)
    assert same(result.lanes, whole.expected(result.survivors))
    # One of the two lies, and the coordinator cannot tell which.
    assert [blame.device_id for blame in result.blamed] == ["device-003", "device-000"]


@pytest.mark.parametrize(
    "lanes",
    [
        Lanes(np.zeros(5, np.uint32), np.zeros(1, np.uint64)),
        Lanes(np.zeros(6, np.uint16), np.zeros(1, np.uint64)),
        Lanes(np.zeros(5, np.uint16), np.zeros(2, np.uint64)),
    ],
)
def test_lanes_that_are_not_the_configurations_are_the_callers_mistake(lanes: Lanes) -> None:
    whole = WholeSum(5)
    boxes = whole.run_until("mask")
    with pytest.raises(ValueError, match="type and shape"):
        whole.clients["device-000"].mask(boxes["device-000"], lanes)
    assert whole.clients["device-000"].state is ClientState.SHARED


def test_read_only_lanes_are_the_callers_mistake() -> None:
    whole = WholeSum(5)
    boxes, lanes = whole.run_until("mask"), copy_of(whole.vectors["device-000"])
    lanes.main.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        whole.clients["device-000"].mask(boxes["device-000"], lanes)
    assert whole.clients["device-000"].state is ClientState.SHARED


def test_one_vector_is_masked_in_a_session_and_never_another() -> None:
    whole = WholeSum(5)
    boxes = whole.run_until("mask")["device-000"]
    client, lanes = whole.clients["device-000"], copy_of(whole.vectors["device-000"])
    answer = client.mask(boxes, lanes)
    masked = copy_of(lanes)

    assert client.mask(boxes, lanes) is answer
    assert same(lanes, masked)

    other = copy_of(whole.vectors["device-000"])
    with pytest.raises(PeerError, match="spent"):
        client.mask(boxes, other)
    assert same(other, whole.vectors["device-000"])
    with pytest.raises(PeerError, match="another question"):
        client.mask(Boxes(boxes.boxes[:-1]), lanes)
    assert client.state is ClientState.MASKED


def test_what_could_open_the_own_vector_is_forgotten_as_soon_as_it_is_masked() -> None:
    whole = WholeSum(5)
    boxes = whole.run_until("mask")["device-000"]
    client, secrets = whole.clients["device-000"], secrets_of(whole.clients["device-000"])
    client.mask(boxes, copy_of(whole.vectors["device-000"]))
    assert client._secrets is None
    assert not any(secrets.mask_seed)
    assert not any(secrets.key_seed)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((1, 2, 3, 4, 5), "own vector is not in the sum"),
        ((0, 1, 2, 3), "4 survivors, of the 5"),
        ((0, 1, 2, 3, 4, 5), "not among those that our vector is masked against"),
        ((0, 1, 2, 3, 4, 6), "no bitmap"),
    ],
)
def test_survivors_with_one_thing_wrong_end_the_session(
    places: tuple[int, ...], message: str
) -> None:
    whole = WholeSum(6)
    boxes = whole.share(whole.advertise(), ["device-005"])
    whole.mask(boxes)
    refuses(whole.clients["device-000"], "consent", Survivors(bitmap_of(places, 6)), message)


UNMASK_LIES: list[tuple[str, Callable[[Unmask], Unmask], str]] = [
    ("others", lambda u: Unmask(Survivors(b"\x1f"), u.consents), "not the survivors"),
    ("too few", lambda u: Unmask(u.survivors, u.consents[:-1]), "3 of the roster signed"),
    ("none", lambda u: Unmask(u.survivors, ()), "0 of the roster signed"),
    ("one twice", lambda u: Unmask(u.survivors, (*u.consents, u.consents[0])), "there twice"),
    (
        "of nobody",
        lambda u: Unmask(u.survivors, (*u.consents, Consent(6, u.consents[0].signature))),
        "nobody in the roster",
    ),
    (
        "of another",
        lambda u: Unmask(u.survivors, (*u.consents[:-1], Consent(5, u.consents[-1].signature))),
        "device-005 did not sign",
    ),
    (
        "forged",
        lambda u: Unmask(u.survivors, (Consent(0, b"x" * 64), *u.consents[1:])),
        "device-000 did not sign",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [(change, message) for _, change, message in UNMASK_LIES],
    ids=[name for name, _, _ in UNMASK_LIES],
)
def test_a_last_question_with_one_thing_wrong_ends_the_session(
    change: Callable[[Unmask], Unmask], message: str
) -> None:
    whole = WholeSum(6)
    unmask = change(whole.run_until("reveal"))
    refuses(whole.clients["device-000"], "reveal", unmask, message)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_answered_once_and_the_same_question_gets_the_same_answer(
    stage: Stage,
) -> None:
    whole = WholeSum(5)
    question = whole.run_until(stage)
    question = question["device-000"] if stage == "mask" else question
    client, lanes = whole.clients["device-000"], copy_of(whole.vectors["device-000"])
    if stage == "advertise":
        assert client.advertise() is client.advertise()
        return
    answer = ask(client, stage, question, lanes)
    state = client.state
    copy = decode(encode(question), type(question))
    assert ask(client, stage, copy, lanes) is answer
    other: dict[str, Any] = {
        "share": Roster(()),
        "mask": Boxes(()),
        "consent": Survivors(b"\x0f"),
        "reveal": Unmask(Survivors(b"\x0f"), ()),
    }
    with pytest.raises(PeerError, match="another question was answered"):
        ask(client, stage, other[stage], lanes)
    assert client.state is state
    assert ask(client, stage, question, lanes) is answer


@pytest.mark.parametrize(("state", "stage"), list(itertools.combinations(STAGES, 2)))
def test_a_question_of_a_later_stage_changes_nothing(state: Stage, stage: Stage) -> None:
    other = WholeSum(5)
    question = other.run_until(stage)
    question = question["device-000"] if stage == "mask" else question
    whole = WholeSum(5)
    whole.run_until(state)
    client = whole.clients["device-000"]
    before = client.state
    with pytest.raises(PeerError, match="has no answer to"):
        ask(client, stage, question, copy_of(whole.vectors["device-000"]))
    assert client.state is before
    assert not is_wiped(client)


def test_after_the_last_answer_nothing_secret_is_left() -> None:
    whole = WholeSum(5)
    whole.run()
    for client in whole.clients.values():
        assert client.state is ClientState.REVEALED
        assert is_wiped(client)


@pytest.mark.parametrize("stage", STAGES)
def test_a_refusal_is_signed_ends_the_session_and_wipes_it(stage: Stage) -> None:
    whole = WholeSum(5)
    whole.run_until(stage)
    client = whole.clients["device-000"]
    refusal = client.refuse(stage, "the owner said no")
    assert client.state is ClientState.REFUSED
    assert is_wiped(client)
    assert (refusal.body, refusal.refusal) == (b"", "the owner said no")
    known = whole.server._intake.roster
    digest = known.digest if known and stage not in ("advertise", "share") else b""
    key = identity_of("device-000").public
    check_answer(refusal, key, config_digest=whole.digest, roster_digest=digest)
    assert client.refuse(stage, "the owner said no") is refusal
    with pytest.raises(PeerError, match="refused has no answer"):
        client.advertise()


def test_there_is_nothing_to_refuse_once_all_was_said() -> None:
    whole = WholeSum(5)
    whole.run()
    with pytest.raises(PeerError, match="nothing left"):
        whole.clients["device-000"].refuse("reveal", "too late")


def test_a_session_that_is_too_old_forgets_itself() -> None:
    whole = WholeSum(5)
    survivors = whole.run_until("consent")
    client = whole.clients["device-000"]
    assert not client.expire(EXPIRY - timedelta(seconds=1))
    assert client.state is ClientState.MASKED
    assert client.expire(EXPIRY)
    assert is_wiped(client)
    with pytest.raises(PeerError, match="refused has no answer"):
        client.consent(survivors)


def test_whatever_fails_inside_an_answer_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WholeSum(5)
    boxes = whole.run_until("mask")["device-000"]
    client, lanes = whole.clients["device-000"], copy_of(whole.vectors["device-000"])

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("shared.secure_sum.client.apply_masks", fail)
    with pytest.raises(MemoryError):
        client.mask(boxes, lanes)
    assert client.state is ClientState.REFUSED
    assert is_wiped(client)


def test_a_machine_shows_its_state_and_nothing_else() -> None:
    whole = WholeSum(5)
    whole.run_until("reveal")
    assert repr(whole.clients["device-000"]) == "SumClient('device-000', state='consented')"
    assert whole.clients["device-000"].roster == tuple(whole.ids)
    assert whole.clients["device-000"].survivors == tuple(whole.ids)


def test_secrets_of_two_sessions_have_nothing_in_common() -> None:
    config = config_of(encoding=encoding_of(length=64))
    members = {"device-000": member_of("device-000")}
    digest = digest_of(encode_config(config))
    answers = [
        SumClient(
            config,
            digest,
            device_id="device-000",
            identity=identity_of("device-000"),
            members=members,
        ).advertise()
        for _ in range(2)
    ]
    assert answers[0].body != answers[1].body
