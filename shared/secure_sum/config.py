"""What one secure sum is about: fixed and signed before anybody takes part, and never negotiated.

Everything that shapes what a sum could reveal stands here: for which question and from which
parameters the devices answer, how many must be in it, how their numbers are encoded and noised.
The digest of the signed bytes is part of every signature and every key of the session, so devices
that were told different things do not understand each other, and nobody sends a vector.
"""

import hashlib
import math
from datetime import datetime
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from shared.errors import PeerError
from shared.manifest import Digest
from shared.messages import Identifier
from shared.untrusted import NOT_JSON

CONFIG_PAYLOAD_TYPE = "application/vnd.shoal.sum-config.v1+json"
MAX_ROSTER = 256  # devices of one complete graph; more are several sums
DEFAULT_AT_LEAST = 16  # honest survivors

LaneBits = Literal[16, 32]
MaskAlgorithm = Literal["aes-128-ctr", "chacha20"]
Purpose = Literal["train", "evaluate", "statistics"]
Fraction = Annotated[float, Meta(ge=0, lt=0.5)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Encoding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How floats become integers; see encoding.py. A step is the smallest difference kept."""

    lane_bits: LaneBits
    length: Annotated[int, Meta(ge=0, le=1_000_000_000)]  # d, main lanes
    clip_norm: Annotated[float, Meta(gt=0)]  # largest L2 norm kept, in the vector's own unit
    steps_per_unit: Annotated[float, Meta(gt=0)]
    max_steps: Annotated[int, Meta(ge=1)]  # largest magnitude of a lane before noise, in steps
    rotation_seed: Annotated[bytes, Meta(min_length=16, max_length=16)] | None = None


class Noise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The share of noise that each device adds; the honest survivors' shares alone suffice.

    The variances of ``survivors`` shares add up to (``multiplier`` · L2 sensitivity)², in steps².
    """

    kind: Literal["skellam", "discrete-gaussian"] = "skellam"
    multiplier: Annotated[float, Meta(gt=0, le=1000)]  # of the whole sum's noise, over clip_norm
    survivors: Annotated[int, Meta(ge=1)]  # n_min - c: shares that are certain to be in the sum


class ExactLane(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number in a 64-bit lane of its own, summed without noise: a weight, a count, a loss."""

    name: Identifier
    steps_per_unit: Annotated[float, Meta(gt=0)] = 1.0
    max_steps: Annotated[int, Meta(ge=1, le=2**62)]  # largest magnitude, in steps


class SumConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One session: one roster, one vector per device, one sum."""

    v: Literal[1] = 1
    session: Key  # random; names the session
    fleet: Identifier
    run_id: Identifier
    round_number: Annotated[int, Meta(ge=0, le=2**31)]
    purpose: Purpose
    group: Annotated[int, Meta(ge=0, le=2**31)] = 0  # devices keep it, in 64 bits
    groups: Annotated[int, Meta(ge=1, le=2**31)] = 1  # sums that the coordinator makes side by side
    task_digest: Digest
    question_digest: Digest  # of plan, seed, metrics, bin edges: whatever shapes the vector
    base_digest: Digest | None  # of the parameters each device received; None: the sum needs none
    min_survivors: Annotated[int, Meta(ge=2)]  # fewest devices whose vectors are in the sum
    max_roster: Annotated[int, Meta(ge=2, le=MAX_ROSTER)]  # n_max
    at_least: Annotated[int, Meta(ge=1)] = DEFAULT_AT_LEAST  # honest survivors: those, less c
    corrupt_fraction: Fraction = 0.1  # γ, of the roster
    corrupt_devices: Annotated[int, Meta(ge=1)] = 1  # c is never below this
    drop_fraction: Fraction = 0.3  # δ, of the roster, that may vanish after the shares were dealt
    threshold: Literal["majority", "group"] = "majority"  # see `threshold_of`
    encoding: Encoding
    exact_lanes: Annotated[tuple[ExactLane, ...], Meta(max_length=1000)] = ()
    noise: Noise | None = None
    mask_algorithm: MaskAlgorithm = "aes-128-ctr"
    server_key: Key  # X25519: what is revealed at the end is sealed to it
    membership_version: Annotated[
        int, Meta(ge=1, le=2**53)
    ]  # of the signed list that the roster is from
    expires_at: datetime  # aware UTC: devices forget the session then

    def __post_init__(self) -> None:
        """Refuse what cannot be summed; raise ValueError, which msgspec turns into its own."""
        if self.min_survivors > self.max_roster:
            raise ValueError("min_survivors is above max_roster")
        if self.expires_at.tzinfo is None:
            raise ValueError("expires_at has no time zone")
        if self.noise is not None and self.exact_lanes:
            raise ValueError("exact lanes beside noised ones would void the noise")
        # Centred lanes hold [-2^(b-1), 2^(b-1)); with noise, wrapping costs accuracy only.
        overflows = self.max_roster * 2 * self.encoding.max_steps >= 2**self.encoding.lane_bits
        if self.noise is None and self.encoding.length and overflows:
            raise ValueError(
                f"{self.max_roster} lanes of ±{self.encoding.max_steps} steps overflow "
                f"{self.encoding.lane_bits} bits"
            )
        for lane in self.exact_lanes:
            if self.max_roster * 2 * lane.max_steps >= 2**64:
                raise ValueError(f"the exact lane {lane.name!r} overflows 64 bits")
        if len({lane.name for lane in self.exact_lanes}) != len(self.exact_lanes):
            raise ValueError("two exact lanes have one name")


_ENCODER = msgspec.json.Encoder(order="deterministic")
_DECODER = msgspec.json.Decoder(SumConfig)


def encode_config(config: SumConfig) -> bytes:
    """Return the bytes that are signed and whose digest binds the session."""
    return _ENCODER.encode(config)


def decode_config(payload: bytes) -> SumConfig:
    """Read what `encode_config` wrote; raise PeerError where it is no possible configuration."""
    try:
        return _DECODER.decode(payload)
    except NOT_JSON as error:
        raise PeerError(f"the configuration of a secure sum does not fit: {error}") from error


def digest_of(payload: bytes) -> bytes:
    """Return H(config), 32 bytes, of the signed payload as it was received."""
    return hashlib.sha256(b"shoal sum config v1\0" + payload).digest()


class Limits(Protocol):
    """What the numbers below follow from: of a `SumConfig`, or of a plan that will make one."""

    @property
    def min_survivors(self) -> int:
        """Fewest devices whose vectors are in the sum."""

    @property
    def max_roster(self) -> int:
        """Most devices that may take part."""

    @property
    def at_least(self) -> int:
        """Fewest honest survivors."""

    @property
    def corrupt_fraction(self) -> float:
        """γ, of the roster."""

    @property
    def corrupt_devices(self) -> int:
        """Fewest that c stands for."""

    @property
    def drop_fraction(self) -> float:
        """δ, of the roster."""

    @property
    def threshold(self) -> Literal["majority", "group"]:
        """See `threshold_of`."""


def corrupted_of(config: Limits, roster_size: int) -> int:
    """Return c: how many members of the roster may be in league with the coordinator."""
    return max(
        1, config.corrupt_devices, math.ceil(round(config.corrupt_fraction * roster_size, 9))
    )


def dropped_of(config: Limits, roster_size: int) -> int:
    """Return how many devices may vanish after the shares were dealt: ⌊δ·n⌋."""
    return math.floor(round(config.drop_fraction * roster_size, 9))


def threshold_of(config: Limits, roster_size: int) -> int:
    """Return t: shares that rebuild a secret, of the ``roster_size`` - 1 that were dealt.

    ``majority``: ⌊(n - 1 + c)/2⌋ + 1, so that 2t > n - 1 + c: no lying coordinator gets both
    secrets of an honest device. ``group``: all but one and ⌊n/10⌋, for groups of robust runs, where
    more than c of so few may be corrupted by chance; that is ⌊0.9 n⌋, and one less where n is a
    multiple of ten, since such a roster could otherwise lose nobody.
    """
    dealt = roster_size - 1
    majority = (dealt + corrupted_of(config, roster_size)) // 2 + 1
    if config.threshold == "majority":
        return majority
    return max(majority, dealt - roster_size // 10)


def survivors_needed(config: Limits, roster_size: int) -> int:
    """Return the fewest survivors of a roster with which a device helps to unmask."""
    return max(
        config.min_survivors,
        config.at_least + corrupted_of(config, roster_size),
        roster_size - dropped_of(config, roster_size),
    )


def check_roster_size(config: Limits, roster_size: int) -> None:
    """Raise PeerError unless a roster of this size can end in a sum, and safely."""
    if roster_size > config.max_roster:
        raise PeerError(f"{roster_size} devices are above the {config.max_roster} of this sum")
    needed = survivors_needed(config, roster_size)
    if roster_size < needed:
        raise PeerError(f"{roster_size} devices are fewer than the {needed} that this sum needs")
    # A survivor's b is dealt to the others: all survivors but itself can reveal a share of it.
    revealing = roster_size - 1 - dropped_of(config, roster_size)
    if revealing < threshold_of(config, roster_size):
        raise PeerError(
            f"{roster_size} devices cannot lose {dropped_of(config, roster_size)} and still reach "
            f"the threshold of {threshold_of(config, roster_size)} shares; lower drop_fraction"
        )
