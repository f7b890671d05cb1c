"""All that the coordinator's part in a secure sum remembers, so that a crash does not end the sum.

The memory is one value that MessagePack carries. It holds the session's private key and, at the
end, shares of secrets: its file is for its owner only, and goes when the session is over. It never
holds a single device's vector, masked or not: only the sum of those that arrived.
"""

from typing import Literal

import msgspec
import numpy as np

from shared.errors import UnavailableError
from shared.secure_sum.config import decode_config
from shared.secure_sum.lane_shape import MAIN_TYPES
from shared.secure_sum.lifecycle import ServerState
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import Roster, Shared
from shared.secure_sum.rules import ShareKind

_COMMITMENT_BYTES = 32


class Blame(msgspec.Struct, frozen=True, array_like=True):
    """A device that did not keep to the protocol, and how; says nothing of anybody's data."""

    device_id: str
    cause: str


class Dealing(msgspec.Struct, frozen=True, array_like=True):
    """What one device promised about what it dealt: 64 bytes per peer, in order of place."""

    seed_commitment: bytes
    share_commitments: bytes

    @classmethod
    def of(cls, shared: Shared) -> "Dealing":
        """Keep of an S1 answer, whose boxes are sorted by receiver, what is needed at the end."""
        commitments = (
            dealt.seed_share_commitment + dealt.key_share_commitment for dealt in shared.dealt
        )
        return cls(shared.seed_commitment, b"".join(commitments))

    def commitment(self, dealer: int, receiver: int, kind: ShareKind) -> bytes:
        """Return what the share of one receiver must hash to."""
        index = 2 * (receiver - (receiver > dealer)) + (kind == "key")
        return self.share_commitments[_COMMITMENT_BYTES * index : _COMMITMENT_BYTES * (index + 1)]


class ServerMemory(msgspec.Struct, kw_only=True):
    """A session from the coordinator's side; places are indices into the roster.

    Attributes:
        config: the configuration's payload, and its digest as devices received it.
        server_key: X25519, raw; what is revealed is sealed to its public half.
        identities: raw Ed25519 keys of those that are asked; later only of the roster.
        left: devices that are not waited for any more, and why.
        answered: by device, SHA-256 of its answer to the stage that is open.
        dealings: by dealer; complete once the boxes are handed out, and U2 are their keys.
        masked: whose vectors are in the sum; in the end U3.
        bad_boxes: by receiver: dealers whose boxes it could not use.
        consents: signatures of the survivors.
        revealed: by revealer, the shares in their slots (`messages.join_shares`).
    """

    v: Literal[1] = 1
    state: ServerState = ServerState.ADVERTISING
    cause: str = ""
    config: bytes
    config_digest: bytes
    server_key: bytes
    identities: dict[str, bytes]
    left: dict[str, str] = {}
    blamed: list[Blame] = []
    answered: dict[str, bytes] = {}
    roster: Roster = Roster(())
    dealings: dict[int, Dealing] = {}
    masked: set[int] = set()
    bad_boxes: dict[int, tuple[int, ...]] = {}
    consents: dict[int, bytes] = {}
    revealed: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"ServerMemory(state={self.state.value!r})"


class Snapshot(msgspec.Struct, kw_only=True):
    """The memory, and the sum of the masked vectors so far."""

    memory: ServerMemory
    main: bytes
    exact: bytes

    def __repr__(self) -> str:
        return f"Snapshot({self.memory!r})"

    def lanes(self) -> Lanes:
        """Return the sum, writable."""
        bits = decode_config(self.memory.config).encoding.lane_bits
        main = np.frombuffer(self.main, dtype=MAIN_TYPES[bits])
        exact = np.frombuffer(self.exact, dtype=np.uint64)
        return Lanes(main=main.copy(), exact=exact.copy())


def encode_snapshot(memory: ServerMemory, lanes: Lanes) -> bytes:
    """Write memory and sum as bytes that nobody but this user may read."""
    snapshot = Snapshot(memory=memory, main=lanes.main.tobytes(), exact=lanes.exact.tobytes())
    return msgspec.msgpack.encode(snapshot)


def decode_snapshot(content: bytes) -> Snapshot:
    """Read a snapshot; raise UnavailableError where the file is damaged."""
    try:
        return msgspec.msgpack.decode(content, type=Snapshot)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UnavailableError(
            "the snapshot of a secure sum is damaged; that session is lost, start a new round"
        ) from error
