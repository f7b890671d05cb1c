"""What devices and coordinator say in one secure sum, whatever carries it: MQTT or Flower.

A question is plain: a device believes nothing in it that it cannot check. An answer is signed by
the device's identity over session, stage, H(config), roster digest and body, so that whoever
carries it cannot forge, move or mix it. Bodies are MessagePack, structs as arrays.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import PeerError
from shared.messages import Identifier, Text
from shared.secure_sum.config import MAX_ROSTER, Key
from shared.signing import SigningKey, VerifyingKey

Stage = Literal["advertise", "share", "mask", "consent", "reveal"]  # S0, S1, S2, S2c, S3
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Commitment = Annotated[bytes, Meta(min_length=32, max_length=32)]
_SLOT_BYTES = 32
_NO_SHARE = bytes(_SLOT_BYTES)

Index = Annotated[int, Meta(ge=0, lt=MAX_ROSTER)]  # place in the roster, which is sorted by id
Box = Annotated[bytes, Meta(min_length=80, max_length=80)]  # two shares of 32 B, and GCM's tag
Bitmap = Annotated[bytes, Meta(max_length=MAX_ROSTER // 8)]  # bit i of byte i//8: roster place i

T = TypeVar("T")


class Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all that follows."""


# --- answers (the body of a SignedAnswer) and the questions before them -------------------------


class Advertised(Struct, frozen=True):
    """S0 answer: fresh public X25519 keys of this session."""

    mask_key: Key
    box_key: Key


class RosterEntry(Struct, frozen=True):
    """One device's S0 answer as its peers get it: they rebuild what was signed."""

    device_id: Identifier
    mask_key: Key
    box_key: Key
    signature: Signature


class Roster(Struct, frozen=True):
    """S1 question: who takes part, U1, sorted by device id."""

    entries: Annotated[tuple[RosterEntry, ...], Meta(max_length=MAX_ROSTER)]


class Dealt(Struct, frozen=True):
    """What one device dealt to one peer: an encrypted pair of shares, and commitments to both."""

    to: Index
    box: Box
    seed_share_commitment: Commitment
    key_share_commitment: Commitment


class Shared(Struct, frozen=True):
    """S1 answer: a box for every peer but oneself, and what the seed must hash to when rebuilt."""

    seed_commitment: Commitment
    dealt: Annotated[tuple[Dealt, ...], Meta(max_length=MAX_ROSTER)]


class Received(Struct, frozen=True):
    """One box as its receiver gets it."""

    dealer: Index
    box: Box
    seed_share_commitment: Commitment
    key_share_commitment: Commitment


class Boxes(Struct, frozen=True):
    """S2 question: the boxes for this device; its senders and the device itself are U2."""

    boxes: Annotated[tuple[Received, ...], Meta(max_length=MAX_ROSTER)]


class Masked(Struct, frozen=True):
    """S2 answer beside the lanes, which travel as arrays: what they hash to, and bad boxes."""

    lanes_digest: Commitment
    bad_boxes: Annotated[tuple[Index, ...], Meta(max_length=MAX_ROSTER)] = ()


class Survivors(Struct, frozen=True):
    """S2c question and the body of its answer: whose vectors are in the sum, U3."""

    bitmap: Bitmap


class Consent(Struct, frozen=True):
    """One device's signature over the survivors, as others get it."""

    place: Index
    signature: Signature


class Unmask(Struct, frozen=True):
    """S3 question: the survivors once more, and that enough of the roster signed them."""

    survivors: Survivors
    consents: Annotated[tuple[Consent, ...], Meta(max_length=MAX_ROSTER)]


class SignedAnswer(Struct, frozen=True, kw_only=True):
    """One device's word at one stage. A refusal has an empty body and says why."""

    session: Key
    stage: Stage
    device_id: Identifier
    body: Annotated[bytes, Meta(max_length=64 * 1024)]  # MessagePack; of S3: sealed slots
    refusal: Text = ""  # says nothing of the data
    signature: Signature


Question = Roster | Boxes | Survivors | Unmask


def encode(message: Struct) -> bytes:
    """Serialise; equal messages give equal bytes."""
    return msgspec.msgpack.encode(message)


def decode(content: bytes, kind: type[T]) -> T:
    """Read what `encode` wrote; raise PeerError where it is no such message."""
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, ValueError) as error:
        raise PeerError(f"not a {kind.__name__} of a secure sum: {error}") from error


def join_shares(shares: Mapping[int, bytes], *, roster_size: int) -> bytes:
    """Lay out what a device reveals at S3, before it is sealed.

    A slot of 32 bytes for each place of the roster holds one share of that dealer (of a survivor's
    seed, or of a dropped device's key, never both), or zeros where there is none. So the length
    says nothing, and who deals a share of zeros, 1 of 2^255, dealt none.
    """
    return b"".join(shares.get(place, _NO_SHARE) for place in range(roster_size))


def dealers_in(revealed: bytes, roster_size: int) -> frozenset[int]:
    """Return of whom there are shares; of nobody if the length is wrong."""
    if len(revealed) != _SLOT_BYTES * roster_size:
        return frozenset()
    return frozenset(place for place in range(roster_size) if share_in(revealed, place))


def share_in(revealed: bytes, dealer: int) -> bytes:
    """Return the share in a dealer's slot; empty where there is none."""
    share = revealed[_SLOT_BYTES * dealer : _SLOT_BYTES * (dealer + 1)]
    return b"" if share == _NO_SHARE else share


def signed_bytes(
    *,
    session: bytes,
    stage: Stage,
    config_digest: bytes,
    roster_digest: bytes,
    device_id: str,
    body: bytes,
    refusal: str = "",
) -> bytes:
    """Return what an answer's signature is over.

    ``roster_digest`` is empty before there is a roster (S0), else SHA-256 of the encoded `Roster`.
    """
    content = [session, stage, config_digest, roster_digest, device_id, body, refusal]
    return b"shoal secure sum v1\0" + msgspec.msgpack.encode(content)


def sign_answer(
    key: SigningKey,
    *,
    session: bytes,
    stage: Stage,
    config_digest: bytes,
    roster_digest: bytes,
    device_id: str,
    body: bytes,
    refusal: str = "",
) -> SignedAnswer:
    """Make a device's answer."""
    content = signed_bytes(
        session=session,
        stage=stage,
        config_digest=config_digest,
        roster_digest=roster_digest,
        device_id=device_id,
        body=body,
        refusal=refusal,
    )
    return SignedAnswer(
        session=session,
        stage=stage,
        device_id=device_id,
        body=body,
        refusal=refusal,
        signature=key.sign(content),
    )


def check_answer(
    answer: SignedAnswer, key: VerifyingKey, *, config_digest: bytes, roster_digest: bytes
) -> None:
    """Raise PeerError unless ``key`` signed ``answer`` in this very session."""
    key.verify(
        answer.signature,
        signed_bytes(
            session=answer.session,
            stage=answer.stage,
            config_digest=config_digest,
            roster_digest=roster_digest,
            device_id=answer.device_id,
            body=answer.body,
            refusal=answer.refusal,
        ),
    )
