"""Every control message and its topic: the border where loose JSON becomes typed, or is refused.

A message is a JSON document (`Envelope`) around one tagged body, wrapped in a DSSE envelope signed
by its sender: the coordinator's command key downwards, the device's identity upwards. A broker that
was taken over can delay or drop, not order, retarget or forge. Unknown *fields* are ignored, so
that either side may be newer; an unknown *type* is refused with a PeerError, counted and logged.

Topics are ``shoal/v1/{fleet}/d/{device}/{up|dn}/{name}``: six slashes and three subscriptions per
device, within the limits of hosted brokers. No weights travel here, but the kilobyte stages of
secure sums do: a device's answer is opaque to this module, and signed by itself.
"""

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.errors import PeerError
from shared.manifest import Digest
from shared.signing import SigningKey, VerifyingKey, open_sealed, seal
from shared.tasks.spec import TaskSpec
from shared.untrusted import NOT_JSON

PROTOCOL_VERSION = 1
OLDEST_PROTOCOL_VERSION = (
    1  # the oldest that a coordinator still serves: its own and the one before
)
PAYLOAD_TYPE = "application/vnd.shoal.control.v1+json"
MAX_MESSAGE_BYTES = 128 * 1024  # sealed; brokers are configured to the same limit
MAX_STAGE_BYTES = 64 * 1024  # of a secure sum's question or answer, before it is wrapped twice
ALL_DEVICES = "*"

DEVICE_ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}\Z"
MAX_TEXT_LENGTH = 500
Text = Annotated[str, Meta(max_length=MAX_TEXT_LENGTH)]
Identifier = Annotated[str, Meta(max_length=128)]
RelayedStage = Literal["share", "consent", "reveal"]  # of a secure sum; the others go by Flower
SumSession = Annotated[bytes, Meta(min_length=32, max_length=32)]
StageContent = Annotated[bytes, Meta(max_length=MAX_STAGE_BYTES)]


class Body(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all message bodies; the class attribute ``tag`` is the wire name."""


# --- from device to coordinator -------------------------------------------------------------------


class PresenceState(StrEnum):
    """The words of Homie's ``$state`` that a device can be in."""

    READY = "ready"
    STOPPED = "stopped"  # said goodbye
    LOST = "lost"  # the broker said so, by the last will


class Presence(Body, frozen=True, tag="presence"):
    """Retained birth and last will. A will with an older ``boot`` than the birth is ignored."""

    state: PresenceState
    boot: Identifier


class Hello(Body, frozen=True, tag="hello"):
    """Who is there, after each connect: what the coordinator plans with. Machine facts only."""

    boot: Identifier
    agent_version: Identifier
    protocol_min: int
    protocol_max: int
    cpu_count: int
    memory_bytes: int
    accelerator: Text = ""
    tasks: tuple[Identifier, ...] = ()  # names of tasks that the owner gave data to
    outbox_depth: int = 0


class Telemetry(Body, frozen=True, tag="telemetry"):
    """Machine facts every minute or so, QoS 0; a gap in ``seq`` is counted, not mended."""

    boot: Identifier
    seq: int
    cpu_percent: float
    memory_bytes: int
    disk_free_bytes: int
    requests: int = 0  # inference requests served since boot
    request_errors: int = 0
    latency_p50_ms: float | None = None


class DeploymentState(StrEnum):
    """Where a device is on its way to the desired version; see edge_agent/deployment.py."""

    IDLE = "idle"
    DOWNLOADING = "downloading"
    TESTING = "testing"
    ACTIVATING = "activating"
    SERVING = "serving"
    FAILED = "failed"


# What kind of failure ended a deployment: the device may get over the first two by itself.
Failure = Literal["", "unavailable", "stale", "missing", "untrusted", "unfit"]


class Reported(Body, frozen=True, tag="reported"):
    """What is true on the device. The digests are of what it *serves now*, whatever was wanted."""

    boot: Identifier
    desired_version: int  # the Desired.version that this reflects; 0 before any
    deployment: DeploymentState
    serving_version: Digest | None = None  # digest of the manifest
    serving_artifact: Digest | None = None  # digest of the model file
    variant: Text = ""  # what the manifest calls that file
    cause: Text = ""  # of a failure, in one sentence
    failure: Failure = ""


class ServedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How one version has been served by this device since it took over: machine facts."""

    version: Digest
    artifact: Digest
    requests: int = 0
    errors: int = 0  # by fault of the model or the server; an answer of NaN is one
    crashes: int = 0  # of the inference server
    p50_ms: float | None = None  # of the latest requests
    p95_ms: float | None = None
    self_test_ms: float | None = None  # of one row, in a throwaway process before the change


class Health(Body, frozen=True, tag="health"):
    """How the served version does, beside the one before it; said every ``Desired.watch_s``."""

    boot: Identifier
    served: ServedFigures | None  # None: nothing is
    before: ServedFigures | None = None  # as it was when the served one took over


class JoinedRun(Body, frozen=True, tag="run.joined"):
    """The trainer is connected to the SuperLink and waits for messages."""

    run_id: Identifier
    session_id: Identifier


class LeftRun(Body, frozen=True, tag="run.left"):
    """The trainer ended."""

    run_id: Identifier
    session_id: Identifier
    cause: Text


class ReplyWaiting(Body, frozen=True, tag="run.reply-waiting"):
    """A reply is complete in the SuperLink; the nudge in the other direction. Loss costs a poll."""

    run_id: Identifier
    session_id: Identifier
    message_id: Identifier


class InvitationAnswer(Body, frozen=True, tag="run.answer"):
    """The device's own decision, with its reason when it says no."""

    run_id: Identifier
    session_id: Identifier
    accepted: bool
    reason: Text = ""


class SumAnswer(Body, frozen=True, tag="sum.answer"):
    """A device's signed word at one stage of a secure sum; see shared/secure_sum/messages.py."""

    run_id: Identifier
    session_id: Identifier
    stage: RelayedStage
    answer: StageContent


# --- from coordinator to device -------------------------------------------------------------------


class Desired(Body, frozen=True, tag="desired"):
    """The whole desired state of one device; retained, and the highest ``version`` wins."""

    version: Annotated[int, Meta(ge=1)]
    model_version: Digest | None = None  # digest of the manifest to serve; None: keep what is there
    watch_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0  # say `Health` so often; 0: never


class Invitation(Body, frozen=True, tag="run.invitation"):
    """Asks a device to take part in a run; it answers by the envelope's expiry."""

    run_id: Identifier
    session_id: Identifier  # one life of SuperLink and ServerApp; a new one asks to join again
    task: TaskSpec
    min_examples: int
    superlink_address: Text  # host:port of the Fleet API, TLS under the pinned CA
    lease_s: float  # the trainer ends by itself when it heard nothing for so long
    mode: Literal["secure", "plain"] = "plain"  # whether updates leave a device only in sums
    min_survivors: int = 0  # fewest devices in each of its sums; 0 where it is plain


class Nudge(Body, frozen=True, tag="run.nudge"):
    """A Flower message waits in the SuperLink; also renews the lease."""

    run_id: Identifier
    session_id: Identifier


class SumQuestion(Body, frozen=True, tag="sum.question"):
    """One stage of a secure sum, for the trainer; it believes nothing that it cannot check."""

    run_id: Identifier
    session_id: Identifier  # of the run
    session: SumSession  # of the sum
    stage: RelayedStage
    question: StageContent


class DismissFromRun(Body, frozen=True, tag="run.dismissed"):
    """The run is over for this device; its trainer ends."""

    run_id: Identifier
    session_id: Identifier
    cause: Text


class Ack(Body, frozen=True, tag="ack"):
    """Ids of messages that are durable at the coordinator; the device may forget them."""

    ids: tuple[Identifier, ...]


class Notice(Body, frozen=True, tag="notice"):
    """Said to all. ``restarting``: come back after a random part of ``window_s``."""

    kind: Literal["stop-training", "restarting"]
    window_s: float = 0.0


class CoordinatorPresence(Body, frozen=True, tag="coordinator.presence"):
    """Retained, said anew at each connect; agents answer each new one with all that is true there.

    A new ``epoch`` tells a restart of the coordinator from a lost connection.
    """

    state: Literal["ready", "stopped"]
    epoch: Identifier


UpBody = (
    Presence
    | Hello
    | Telemetry
    | Reported
    | Health
    | JoinedRun
    | LeftRun
    | ReplyWaiting
    | InvitationAnswer
    | SumAnswer
)
DownBody = (
    Desired | Invitation | Nudge | SumQuestion | DismissFromRun | Ack | Notice | CoordinatorPresence
)
AnyBody = UpBody | DownBody


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What every message says beside its body. Times are aware UTC."""

    v: int
    id: Identifier
    device: Identifier  # who speaks or is spoken to; ``ALL_DEVICES`` for notices
    sent_at: datetime
    expires_at: datetime
    reply_to: Identifier | None = None
    body: AnyBody


class Delivery(msgspec.Struct, frozen=True):
    """How one kind of message travels."""

    name: str  # last level of the topic
    qos: Literal[0, 1]
    expiry: timedelta
    retain: bool = False
    durable: bool = False  # kept in the sender's outbox until the coordinator acknowledged it


_MINUTE, _HOUR, _DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
UP: Mapping[type[Body], Delivery] = {
    Presence: Delivery("presence", 1, 7 * _DAY, retain=True),
    Hello: Delivery("hello", 1, _HOUR),
    Telemetry: Delivery("telemetry", 0, _MINUTE),
    Reported: Delivery("state", 1, _DAY),
    Health: Delivery("health", 1, 5 * _MINUTE),
    JoinedRun: Delivery("event", 1, 7 * _DAY, durable=True),
    LeftRun: Delivery("event", 1, 7 * _DAY, durable=True),
    ReplyWaiting: Delivery("announce", 1, 5 * _MINUTE),
    InvitationAnswer: Delivery("reply", 1, 5 * _MINUTE),
    SumAnswer: Delivery("sum", 1, 5 * _MINUTE),
}
DOWN: Mapping[type[Body], Delivery] = {
    Desired: Delivery("desired", 1, 3650 * _DAY, retain=True),
    Invitation: Delivery("command", 1, _MINUTE),
    Nudge: Delivery("command", 1, 5 * _MINUTE),
    SumQuestion: Delivery("sum", 1, 5 * _MINUTE),
    DismissFromRun: Delivery("command", 1, _HOUR),
    Ack: Delivery("ack", 1, _HOUR),
    Notice: Delivery("notice", 1, 5 * _MINUTE),
    CoordinatorPresence: Delivery("presence", 1, 3650 * _DAY, retain=True),
}
_TO_ALL = (Notice,)

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Envelope)
_UP_TOPIC = re.compile(r"^shoal/v1/([^/]+)/d/([^/]+)/up/([a-z-]+)$")


def topic_of(body: Body, *, fleet: str, device: str) -> str:
    """Return the one topic on which ``body`` travels."""
    if isinstance(body, CoordinatorPresence):
        return f"shoal/v1/{fleet}/coordinator/presence"
    if isinstance(body, _TO_ALL):
        return f"shoal/v1/{fleet}/all/dn/{DOWN[type(body)].name}"
    if type(body) in UP:
        return f"shoal/v1/{fleet}/d/{device}/up/{UP[type(body)].name}"
    return f"shoal/v1/{fleet}/d/{device}/dn/{DOWN[type(body)].name}"


def device_subscriptions(*, fleet: str, device: str) -> tuple[str, ...]:
    """Return the disjoint filters of an agent."""
    return (
        f"shoal/v1/{fleet}/d/{device}/dn/+",
        f"shoal/v1/{fleet}/all/dn/+",
        f"shoal/v1/{fleet}/coordinator/presence",
    )


def coordinator_subscriptions(*, fleet: str) -> tuple[str, ...]:
    """Return the filters of the coordinator: everything that devices say."""
    return (f"shoal/v1/{fleet}/d/+/up/+",)


def device_of_topic(topic: str) -> str:
    """Return the device id in an upward topic, to know whose key must have signed.

    Raises:
        PeerError: the topic is none of ours.
    """
    if match := _UP_TOPIC.match(topic):
        return match[2]
    raise PeerError(f"not a topic of a device: {topic[:200]!r}")


def delivery_of(body: Body) -> Delivery:
    """Return how ``body`` travels."""
    return UP.get(type(body)) or DOWN[type(body)]


def new_envelope(
    body: AnyBody,
    *,
    device: str,
    now: datetime,
    lifetime: timedelta | None = None,
    reply_to: str | None = None,
) -> Envelope:
    """Address ``body``; it lives as long as its kind does unless ``lifetime`` says otherwise."""
    return Envelope(
        v=PROTOCOL_VERSION,
        id=uuid.uuid4().hex,
        device=device,
        sent_at=now,
        expires_at=now + (lifetime or delivery_of(body).expiry),
        reply_to=reply_to,
        body=body,
    )


def encode(envelope: Envelope, key: SigningKey) -> bytes:
    """Serialise and sign.

    Raises:
        ValueError: our own message is over MAX_MESSAGE_BYTES; a broker would cut the connection.
    """
    sealed = seal(_ENCODER.encode(envelope), payload_type=PAYLOAD_TYPE, key=key)
    if len(sealed) > MAX_MESSAGE_BYTES:
        kind = type(envelope.body).__name__
        raise ValueError(f"{kind} of {len(sealed)} bytes is over {MAX_MESSAGE_BYTES}")
    return sealed


def decode(
    sealed: bytes, *, device: str, trusted: Mapping[str, VerifyingKey], now: datetime
) -> Envelope:
    """Check everything that can be checked without state, and return the message.

    Args:
        sealed: what arrived.
        device: on an agent its own id, on the coordinator the id in the topic.
        trusted: the keys that may have signed, by key id.
        now: aware UTC.

    Raises:
        PeerError: too large, unsigned, altered, for somebody else, expired, or off the schema.
    """
    if len(sealed) > MAX_MESSAGE_BYTES:
        raise PeerError(f"message of {len(sealed)} bytes is over {MAX_MESSAGE_BYTES}")
    payload = open_sealed(sealed, payload_type=PAYLOAD_TYPE, trusted=trusted)
    try:
        envelope = _DECODER.decode(payload)
    except NOT_JSON as error:
        raise PeerError(f"message breaks the schema: {error}") from error
    if not OLDEST_PROTOCOL_VERSION <= envelope.v <= PROTOCOL_VERSION:
        raise PeerError(f"protocol version {envelope.v} is not spoken here")
    if envelope.device not in {device, ALL_DEVICES}:
        raise PeerError(f"message for {envelope.device!r} reached {device!r}")
    if envelope.expires_at.tzinfo is None or envelope.expires_at <= now:
        raise PeerError(f"message expired at {envelope.expires_at.isoformat()}")
    return envelope


def as_text(words: object) -> str:
    """Cut what a person is told (an error's sentence) to what a `Text` field may hold."""
    return " ".join(str(words).split())[:MAX_TEXT_LENGTH]


def utc_now() -> datetime:
    """Return the wall clock, aware; the only place where shells take it from."""
    return datetime.now(UTC)
