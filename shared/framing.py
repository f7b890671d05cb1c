"""Several protobufs in one HTTP body, so that a small message costs one request instead of four.

Each part is preceded by its length in four bytes, big-endian, as in Flower's own streams. The first
part is the request or the response of Flower's standard call; the others are the objects of its
messages, each as the PushObjectRequest that would have carried it. What is too large for a batch,
such as a vector of parameters, goes by Flower's standard calls; what is small beside it does not.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import httpx

MAX_MESSAGE_BYTES = 256 * 1024  # of one message's objects, as `object_cost` counts them
MAX_BATCH_BYTES = 8 * 1024 * 1024  # of all objects in one request or response
_LENGTH = struct.Struct(">I")
_LEAST_OBJECT_BYTES = 64  # an object's id alone
_ID_BYTES = 200  # it travels in the object, and in the tree of its message


class Frames:
    """Parts of one body; passes for a protobuf in Flower's HTTP client."""

    def __init__(self, parts: Iterable[bytes] = ()) -> None:
        self.parts = list(parts)

    def SerializeToString(self, *, deterministic: bool = True) -> bytes:  # noqa: N802  # protobuf's
        """Return the body, which is the same each time."""
        assert deterministic
        return b"".join(piece for part in self.parts for piece in (_LENGTH.pack(len(part)), part))

    def ParseFromString(self, body: bytes | bytearray) -> None:  # noqa: N802  # protobuf's
        """Split a body.

        Raises:
            ValueError: its lengths do not add up, or there are more parts than objects could make.
        """
        parts: list[bytes] = []
        start = 0
        while start < len(body):
            end = start + _LENGTH.size
            if end <= len(body):
                end += _LENGTH.unpack_from(body, start)[0]
            if end > len(body) or end - start < _LENGTH.size:
                raise ValueError("a part of the batch is cut off")
            parts.append(bytes(body[start + _LENGTH.size : end]))
            start = end
            if len(parts) > 1 + len(body) // _LEAST_OBJECT_BYTES:
                raise ValueError("the batch has parts that are no objects")
        if not parts:
            raise ValueError("the batch is empty")
        self.parts = parts


class Deflatable(Protocol):
    """An object of a Flower message."""

    def deflate(self) -> bytes:
        """Return its bytes on the wire."""


class Batches:
    """Sends batches until the server turns out to know none."""

    def __init__(self, post: Callable[..., Any]) -> None:
        self._post = post  # `ProtobufClient._unary_unary` of a Flower client
        self._known = True

    def post(self, path: str, parts: Iterable[Any], response_type: type) -> Any:
        """Return the response to some protobufs, or None where the server knows no batches.

        Raises:
            httpx.HTTPError: as Flower's client does.
        """
        if not self._known:
            return None
        request = Frames(part.SerializeToString() for part in parts)
        try:
            return self._post(
                path=path, rpc_method=path, request=request, response_type=response_type
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.NOT_FOUND:
                raise
            self._known = False
            return None


def object_cost(content: bytes) -> int:
    """Return what an object counts in a batch, in bytes."""
    return len(content) + _ID_BYTES


def small_contents(messages: Iterable[Mapping[str, Deflatable]]) -> dict[str, bytes]:
    """Return the bytes of the messages' small objects, as far as one batch holds them.

    Args:
        messages: of each, its objects by their ids, children first.
    """
    chosen: dict[str, bytes] = {}
    large: set[str] = set()  # may be part of many messages, and is large in each
    left = MAX_BATCH_BYTES
    for objects in messages:
        contents = _contents(objects, chosen, large)
        added = {object_id: each for object_id, each in contents.items() if object_id not in chosen}
        left -= sum(map(object_cost, added.values()))
        if left < 0:
            break
        chosen |= added
    return chosen


def _contents(
    objects: Mapping[str, Deflatable], known: Mapping[str, bytes], large: set[str]
) -> dict[str, bytes]:
    """Return a message's objects, but for those that are too large; add those to ``large``."""
    contents: dict[str, bytes] = {}
    left = MAX_MESSAGE_BYTES
    for object_id, item in objects.items():
        if object_id in large:
            continue
        content = known.get(object_id) or item.deflate()
        if (cost := object_cost(content)) <= left:
            contents[object_id] = content
            left -= cost
        elif cost > MAX_MESSAGE_BYTES:
            large.add(object_id)
    return contents
