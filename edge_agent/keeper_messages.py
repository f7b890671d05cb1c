"""What the process of one message and the keeper of secure sums say to each other.

One call and one reply per connection: MessagePack behind eight bytes of length, over a Unix socket
that only this user can reach. Nothing here is shown by a repr, since it is the owner's data.
"""

import socket
import struct
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.privacy.sources import DataUse
from shared.errors import PeerError
from shared.secure_sum.messages import Stage

T = TypeVar("T")
_LENGTH = struct.Struct(">Q")
_READ_BYTES = 4 * 1024 * 1024


class Array(msgspec.Struct, frozen=True):
    """A vector, shape (len,)."""

    dtype: str
    content: bytes

    @classmethod
    def of(cls, vector: NDArray[Any]) -> "Array":
        """Copy a vector."""
        return cls(vector.dtype.str, vector.tobytes())

    def read(self) -> NDArray[Any]:
        """Return it, read-only."""
        return np.frombuffer(self.content, np.dtype(self.dtype))

    def __repr__(self) -> str:
        return f"Array({self.dtype})"


class _Call(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    home: str


class Open(_Call, frozen=True, kw_only=True):
    """`SecureSums.open`."""

    sealed_config: bytes
    task_digest: str
    question_digest: str
    base_digest: str | None
    data: DataUse


class Advertise(_Call, frozen=True, kw_only=True):
    """`SecureSums.advertise`."""

    session: bytes
    vector: Array | None
    exact: dict[str, float]


class Decline(_Call, frozen=True, kw_only=True):
    """`SecureSums.decline`."""

    session: bytes
    reason: str


class Answer(_Call, frozen=True, kw_only=True):
    """`SecureSums.answer`."""

    session: bytes
    stage: Stage
    question: bytes


class Mask(_Call, frozen=True, kw_only=True):
    """`SecureSums.mask`."""

    session: bytes
    question: bytes


class Stop(_Call, frozen=True, kw_only=True):
    """Forget everything and end."""


class Opened(msgspec.Struct, frozen=True, tag=True):
    """What the caller needs to make its vector."""

    config: bytes
    config_digest: bytes


class Said(msgspec.Struct, frozen=True, tag=True):
    """A signed answer and, at the stage "mask", the masked vector."""

    answer: bytes = b""
    main: Array | None = None
    exact: Array | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An error of shared/errors.py, by name; other errors stay in the keeper's log."""

    kind: str
    message: str


Calls = Open | Advertise | Decline | Answer | Mask | Stop
Replies = Opened | Said | Failed


def send(connection: socket.socket, message: msgspec.Struct) -> None:
    """Write one message; raise OSError where the other side is gone."""
    content = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(content)))
    connection.sendall(content)


def receive(connection: socket.socket, kind: Any) -> Any:
    """Read one message.

    Args:
        connection: blocking.
        kind: a struct or a union of structs.

    Raises:
        PeerError: it is none; our two sides are then of different versions.
        OSError: the other side is gone.
    """
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    try:
        return msgspec.msgpack.decode(_read(connection, length), type=kind)
    except msgspec.DecodeError as error:
        raise PeerError("the keeper of secure sums is of another version; end it") from error


def _read(connection: socket.socket, length: int) -> bytearray:
    content = bytearray()
    while len(content) < length:
        piece = connection.recv(min(_READ_BYTES, length - len(content)))
        if not piece:
            raise ConnectionResetError("the connection ended in the middle of a message")
        content += piece
    return content
