"""The border of the control plane: what is refused, and why."""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from shared.errors import PeerError
from shared.messages import (
    ALL_DEVICES,
    DOWN,
    MAX_MESSAGE_BYTES,
    MAX_STAGE_BYTES,
    MAX_TEXT_LENGTH,
    PAYLOAD_TYPE,
    PROTOCOL_VERSION,
    UP,
    Ack,
    AnyBody,
    CoordinatorPresence,
    DeploymentState,
    Desired,
    DismissFromRun,
    Envelope,
    Health,
    Hello,
    Invitation,
    InvitationAnswer,
    JoinedRun,
    LeftRun,
    Notice,
    Nudge,
    Presence,
    PresenceState,
    RelayedStage,
    ReplyWaiting,
    Reported,
    ServedFigures,
    SumAnswer,
    SumQuestion,
    Telemetry,
    as_text,
    coordinator_subscriptions,
    decode,
    delivery_of,
    device_of_topic,
    device_subscriptions,
    encode,
    new_envelope,
    topic_of,
)
from shared.secure_sum.config import MAX_ROSTER
from shared.secure_sum.messages import (
    Consent,
    Dealt,
    Roster,
    RosterEntry,
    Shared,
    SignedAnswer,
    Survivors,
    Unmask,
    join_shares,
)
from shared.secure_sum.messages import encode as encode_stage
from shared.signing import SigningKey, seal
from shared.tasks.spec import TaskSpec

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
KEY = SigningKey.generate()
TRUSTED = {KEY.public.key_id: KEY.public}
BODIES: tuple[AnyBody, ...] = (
    Presence(state=PresenceState.READY, boot="b"),
    Hello(
        boot="b",
        agent_version="1",
        protocol_min=1,
        protocol_max=1,
        cpu_count=2,
        memory_bytes=1,
        tasks=("digits",),
    ),
    Telemetry(boot="b", seq=1, cpu_percent=1.5, memory_bytes=1, disk_free_bytes=1),
    Reported(boot="b", desired_version=3, deployment=DeploymentState.FAILED, cause="no space"),
    Health(
        boot="b",
        served=ServedFigures(version="a" * 64, artifact="b" * 64, requests=3, p95_ms=0.4),
    ),
    JoinedRun(run_id="r", session_id="s"),
    LeftRun(run_id="r", session_id="s", cause="dismissed"),
    ReplyWaiting(run_id="r", session_id="s", message_id="m"),
    InvitationAnswer(run_id="r", session_id="s", accepted=False, reason="busy"),
    SumAnswer(run_id="r", session_id="s", stage="share", answer=b"signed"),
    Desired(version=1, model_version="a" * 64),
    Invitation(
        run_id="r",
        session_id="s",
        task=TaskSpec("digits", "image-classification", {"network": "lenet"}),
        min_examples=1,
        superlink_address="127.0.0.1:1",
        lease_s=60,
    ),
    Nudge(run_id="r", session_id="s"),
    SumQuestion(run_id="r", session_id="s", session=bytes(32), stage="reveal", question=b"why"),
    DismissFromRun(run_id="r", session_id="s", cause="done"),
    Ack(ids=("m",)),
    Notice(kind="restarting", window_s=5),
    CoordinatorPresence(state="ready", epoch="e"),
)


def sealed(body: AnyBody, *, device: str = "edge-1", lifetime: timedelta | None = None) -> bytes:
    return encode(new_envelope(body, device=device, now=NOW, lifetime=lifetime), KEY)


def read(message: bytes, *, device: str = "edge-1", now: datetime = NOW) -> Envelope:
    return decode(message, device=device, trusted=TRUSTED, now=now)


def forged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A well-signed message whose JSON was changed before signing."""
    dsse = json.loads(sealed(Nudge(run_id="r", session_id="s")))
    document = json.loads(b64decode(dsse["payload"]))
    change(document)
    return seal(json.dumps(document).encode(), payload_type=PAYLOAD_TYPE, key=KEY)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_every_message_arrives_as_it_was_sent(body: AnyBody) -> None:
    envelope = read(sealed(body))
    assert envelope.body == body
    assert envelope.expires_at - envelope.sent_at == delivery_of(body).expiry


def test_every_kind_of_message_is_listed_here() -> None:
    assert {type(body) for body in BODIES} == set(UP) | set(DOWN)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_topics_have_six_levels_below_shoal_and_are_subscribed_once(body: AnyBody) -> None:
    topic = topic_of(body, fleet="main", device="edge-1")
    filters = device_subscriptions(fleet="main", device="edge-1")
    if type(body) in UP:
        filters = coordinator_subscriptions(fleet="main")
        assert device_of_topic(topic) == "edge-1"
    assert topic.count("/") <= 6
    assert len([f for f in filters if _matches(f, topic)]) == 1


def _matches(topic_filter: str, topic: str) -> bool:
    parts, levels = topic_filter.split("/"), topic.split("/")
    return len(parts) == len(levels) and all(
        a in {"+", b} for a, b in zip(parts, levels, strict=True)
    )


@pytest.mark.parametrize("topic", ["", "shoal/v1/main/d/edge-1/dn/desired", "a/b", "shoal/v1/x/d"])
def test_a_foreign_topic_names_no_device(topic: str) -> None:
    with pytest.raises(PeerError, match="not a topic of a device"):
        device_of_topic(topic)


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match="is over 131072"):
        read(b"{" * (MAX_MESSAGE_BYTES + 1))


def test_we_refuse_to_send_an_oversized_message() -> None:
    with pytest.raises(ValueError, match=r"Ack of .* bytes is over"):
        sealed(Ack(ids=tuple(f"{number:0128d}" for number in range(2000))))


def test_the_longest_words_of_a_sum_of_256_devices_fit_into_a_message() -> None:
    names = [f"{number:063d}" for number in range(MAX_ROSTER)]  # the longest that enrolment takes
    entries = [RosterEntry(name, bytes(32), bytes(32), bytes(64)) for name in names]
    dealt = [Dealt(to, bytes(80), bytes(32), bytes(32)) for to in range(MAX_ROSTER - 1)]
    consents = [Consent(place, bytes(64)) for place in range(MAX_ROSTER)]
    unmask = Unmask(Survivors(bytes(MAX_ROSTER // 8)), tuple(consents))
    about = {"run_id": "r" * 128, "session_id": "s" * 128}

    questions: list[tuple[RelayedStage, bytes]] = [
        ("share", encode_stage(Roster(tuple(entries)))),
        ("reveal", encode_stage(unmask)),
    ]
    for stage, question in questions:
        asked = SumQuestion(**about, session=bytes(32), stage=stage, question=question)
        assert read(sealed(asked, device=names[0]), device=names[0]).body == asked

    answers: list[tuple[RelayedStage, bytes]] = [
        ("share", encode_stage(Shared(bytes(32), tuple(dealt)))),
        ("reveal", join_shares({}, roster_size=MAX_ROSTER) + bytes(48)),  # sealed
    ]
    for stage, body in answers:
        signed = SignedAnswer(
            session=bytes(32), stage=stage, device_id=names[0], body=body, signature=bytes(64)
        )
        answer = SumAnswer(**about, stage=stage, answer=encode_stage(signed))
        assert read(sealed(answer, device=names[0]), device=names[0]).body == answer


def test_what_is_no_word_of_a_stage_is_refused() -> None:
    about = {"run_id": "r", "session_id": "s"}
    endless = SumAnswer(**about, stage="share", answer=bytes(MAX_STAGE_BYTES + 1))
    short = SumQuestion(**about, session=bytes(31), stage="consent", question=b"")
    vector = SumQuestion(**about, session=bytes(32), stage="mask", question=b"")  # type: ignore[arg-type]
    for body in (endless, short, vector):
        with pytest.raises(PeerError, match="breaks the schema"):
            read(sealed(body))


def test_an_invitation_of_an_older_coordinator_counts_as_one_to_a_plain_run() -> None:
    body = next(body for body in BODIES if isinstance(body, Invitation))
    document = msgspec.to_builtins(body)
    del document["mode"], document["min_survivors"]
    assert msgspec.convert(document, Invitation).mode == "plain"


def test_an_unsigned_message_is_refused() -> None:
    dsse = json.loads(sealed(Nudge(run_id="r", session_id="s")))
    dsse["signatures"] = []
    with pytest.raises(PeerError, match="no key that is trusted"):
        read(json.dumps(dsse).encode())


def test_a_message_signed_by_somebody_else_is_refused() -> None:
    stranger = SigningKey.generate()
    envelope = new_envelope(Nudge(run_id="r", session_id="s"), device="edge-1", now=NOW)
    with pytest.raises(PeerError, match="no key that is trusted"):
        read(encode(envelope, stranger))


def test_a_signature_under_a_borrowed_key_id_is_refused() -> None:
    stranger = SigningKey.generate()
    envelope = new_envelope(Nudge(run_id="r", session_id="s"), device="edge-1", now=NOW)
    dsse = json.loads(encode(envelope, stranger))
    dsse["signatures"][0]["keyid"] = KEY.public.key_id
    with pytest.raises(PeerError, match="bad signature"):
        read(json.dumps(dsse).encode())


def test_an_altered_message_is_refused() -> None:
    dsse = json.loads(sealed(Desired(version=1)))
    payload = b64decode(dsse["payload"]).replace(b'"version":1', b'"version":9')
    dsse["payload"] = b64encode(payload).decode()
    with pytest.raises(PeerError, match="bad signature"):
        read(json.dumps(dsse).encode())


def test_a_signed_document_of_another_kind_is_refused() -> None:
    manifest = seal(b"{}", payload_type="application/vnd.shoal.manifest.v1+json", key=KEY)
    with pytest.raises(PeerError, match="wanted"):
        read(manifest)


def test_a_message_for_another_device_is_refused() -> None:
    with pytest.raises(PeerError, match="message for 'edge-2' reached 'edge-1'"):
        read(sealed(Desired(version=1), device="edge-2"))


def test_a_message_for_all_is_for_me() -> None:
    assert read(sealed(Notice(kind="stop-training"), device=ALL_DEVICES)).device == ALL_DEVICES


def test_an_expired_message_is_refused() -> None:
    message = sealed(Nudge(run_id="r", session_id="s"), lifetime=timedelta(seconds=5))
    assert read(message, now=NOW + timedelta(seconds=4.9))
    with pytest.raises(PeerError, match="expired at"):
        read(message, now=NOW + timedelta(seconds=5))


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(PeerError, match="expired at"):
        read(forged(lambda document: document.update(expires_at="2030-01-01T00:00:00")))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(PeerError, match="breaks the schema"):
        read(forged(lambda document: document["body"].update(type="format-disk")))


def test_an_unknown_field_is_ignored_because_the_other_side_may_be_newer() -> None:
    envelope = read(forged(lambda document: document["body"].update(colour="blue")))
    assert envelope.body == Nudge(run_id="r", session_id="s")


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1])
def test_another_protocol_version_is_refused(version: int) -> None:
    with pytest.raises(PeerError, match="is not spoken here"):
        read(forged(lambda document: document.update(v=version)))


@pytest.mark.parametrize("missing", ["v", "id", "device", "sent_at", "expires_at", "body"])
def test_a_missing_field_is_refused(missing: str) -> None:
    with pytest.raises(PeerError, match="breaks the schema"):
        read(forged(lambda document: document.pop(missing)))


@pytest.mark.parametrize("garbage", [b"", b"\x00\xff", b"[]", b"null", b'{"payload": 3}'])
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(PeerError, match="not a signed envelope"):
        read(garbage)


def test_a_words_field_is_bounded_on_arrival_and_cut_before_sending() -> None:
    endless = "word " * 1000
    with pytest.raises(PeerError, match="breaks the schema"):
        read(sealed(LeftRun(run_id="r", session_id="s", cause=endless)))
    cut = as_text(ValueError(f"two\nlines {endless}"))
    assert cut.startswith("two lines word")
    assert len(cut) == MAX_TEXT_LENGTH
    assert read(sealed(LeftRun(run_id="r", session_id="s", cause=cut)))


def test_messages_on_the_wire_stay_readable_json() -> None:
    document = msgspec.json.decode(b64decode(json.loads(sealed(Desired(version=1)))["payload"]))
    assert document["body"] == {
        "type": "desired",
        "version": 1,
        "model_version": None,
        "watch_s": 0.0,
    }
