"""What each field that leaves a device tells: something of the machine, or something of its data.

``machine`` fields travel in clear: addresses, states, sizes, times, keys, signatures. ``data``
fields depend on the owner's rows; they leave only inside a secure sum, or, where the owner allowed
it by `individual_updates`, in a plain round. A field that is not declared here fails the build, so
nobody adds one without saying which it is.

A refusal's reason counts as ``machine``: it is the device's own word about itself, one of a few
sentences, and none of them quotes a value.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from shared.enrolment import EnrolmentRequest
from shared.judging import CandidateFacts
from shared.messages import (
    Envelope,
    Health,
    Hello,
    InvitationAnswer,
    JoinedRun,
    LeftRun,
    Presence,
    ReplyWaiting,
    Reported,
    ServedFigures,
    SumAnswer,
    Telemetry,
)
from shared.secure_sum.messages import (
    Advertised,
    Dealt,
    Masked,
    Shared,
    SignedAnswer,
    Survivors,
)


class Tells(StrEnum):
    """What a field is about."""

    MACHINE = "machine"
    DATA = "data"


def _machine(*names: str) -> Mapping[str, Tells]:
    return dict.fromkeys(names, Tells.MACHINE)


UPLINK: Mapping[type[msgspec.Struct], Mapping[str, Tells]] = {
    # MQTT
    Envelope: _machine("v", "id", "device", "sent_at", "expires_at", "reply_to", "body"),
    Presence: _machine("state", "boot"),
    Hello: _machine(
        "boot", "agent_version", "protocol_min", "protocol_max", "cpu_count", "memory_bytes",
        "accelerator", "tasks", "outbox_depth",
    ),
    Telemetry: _machine(
        "boot", "seq", "cpu_percent", "memory_bytes", "disk_free_bytes", "requests",
        "request_errors", "latency_p50_ms",
    ),
    Reported: _machine(
        "boot", "desired_version", "deployment", "serving_version", "serving_artifact",
        "variant", "cause", "failure",
    ),
    Health: _machine("boot", "served", "before"),
    ServedFigures: _machine(
        "version", "artifact", "requests", "errors", "crashes", "p50_ms", "p95_ms", "self_test_ms"
    ),
    InvitationAnswer: _machine("run_id", "session_id", "accepted", "reason"),
    JoinedRun: _machine("run_id", "session_id"),
    LeftRun: _machine("run_id", "session_id", "cause"),
    ReplyWaiting: _machine("run_id", "session_id", "message_id"),
    SumAnswer: _machine("run_id", "session_id", "stage", "answer"),
    # one stage of a secure sum, over MQTT or Flower
    SignedAnswer: _machine("session", "stage", "device_id", "body", "refusal", "signature"),
    Advertised: _machine("mask_key", "box_key"),
    Shared: _machine("seed_commitment", "dealt"),
    Dealt: _machine("to", "box", "seed_share_commitment", "key_share_commitment"),
    Masked: _machine("lanes_digest", "bad_boxes"),  # the digest is of lanes that are masked
    Survivors: _machine("bitmap"),
    CandidateFacts: _machine(  # measured on rows drawn from the contract, before the owner's
        "name", "failure", "load_ms", "p50_ms", "p95_ms", "memory_bytes"
    ),
    # HTTP
    EnrolmentRequest: _machine(
        "token_id", "secret", "device_id", "identity_key", "node_key_pem", "identity_proof",
        "node_proof",
    ),
}  # fmt: skip

# Replies through Flower: "record" or "record.key"; a record without a key holds any names.
SUMMED_REPLY: Mapping[str, Tells] = {
    "sum.answer": Tells.MACHINE,
    "facts.json": Tells.MACHINE,  # of judged files: see `CandidateFacts` below
    "lanes": Tells.DATA,  # masked: uniform numbers to whoever lacks the sum's other terms
    "exact": Tells.DATA,  # likewise
}
PLAIN_REPLY: Mapping[str, Tells] = {  # only by the owner's `individual_updates`
    "parameters": Tells.DATA,
    "metrics": Tells.DATA,
}
