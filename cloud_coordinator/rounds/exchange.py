"""The rounds' door to Flower: questions to devices and their replies, as values of our own.

Only Flower's public Message API is used, so this works over any `Grid`: our `RunGrid`, Flower's
`HttpGrid`, and the one in memory of its simulation engine.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from shared.errors import PeerError
from shared.parameters import Vector
from shared.run_plan import TrainingPlan

_CAUSE_LENGTH = 300
_NODE_UNAVAILABLE = 5  # Flower's error code for a node that missed its heartbeats
_BEFORE_HEADER = 10  # bytes of magic, version and length
_VECTOR_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00([\s\S]{2})"
    rb"\{'descr': '([ -&(-~]{1,16})', 'fortran_order': False, 'shape': \(([0-9, ]{0,64})\), \} *\n"
)
_ERROR_WORDS = {  # what Flower's codes mean, for errors that come without a reason
    1: "its ClientApp could not be loaded",
    2: "its ClientApp raised an error",
    3: "the message expired before it was answered",
    4: "the reply expired before it was complete",
    _NODE_UNAVAILABLE: "its node missed its heartbeats",
    7: "it could not use the app bundle",
    8: "its ClientApp ended abruptly",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one message: an answer, or why there is none."""

    message_id: str  # of the question
    failure: str = ""  # in words; empty for an answer
    gone: bool = False  # of a failure: the device is away
    parameters: Vector | None = None  # shape (d,)
    statistics: Mapping[str, float] = field(default_factory=dict)


class Exchange:
    """Asks and listens through one Grid; blocking."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def node_ids(self) -> tuple[int, ...]:
        """Return the nodes that are online, for where nobody announces them."""
        return tuple(self._grid.get_node_ids())

    def ask_to_train(
        self,
        parameters: Vector,
        plan: TrainingPlan,
        node_ids: Sequence[int],
        *,
        round_number: int,
        seed: int,
        min_examples: int,
        ttl_s: float,
    ) -> dict[int, str]:
        """Ask nodes to train from ``parameters``, shape (d,).

        Returns:
            The id of each node's message, which its reply names; nodes whose message was refused
            are missing.
        """
        config = ConfigRecord(
            {
                "json": msgspec.json.encode(plan).decode(),
                "round": round_number,
                "seed": seed,
                "min_examples": min_examples,
            }
        )
        content = RecordDict({"parameters": ArrayRecord([parameters]), "plan": config})
        return self._push(MessageType.TRAIN, content, node_ids, round_number, ttl_s)

    def ask_to_evaluate(
        self, parameters: Vector, node_ids: Sequence[int], *, round_number: int, ttl_s: float
    ) -> dict[int, str]:
        """Ask nodes to measure ``parameters`` on their held-out rows; returns as `ask_to_train`."""
        content = RecordDict({"parameters": ArrayRecord([parameters])})
        return self._push(MessageType.EVALUATE, content, node_ids, round_number, ttl_s)

    def replies(self, message_ids: Iterable[str]) -> Iterator[Reply]:
        """Pull what is there, one reply at a time, each only when the caller is done with the last.

        A message that was answered must not be asked for again: the answer would be an error.
        """
        for message_id in message_ids:
            for message in self._grid.pull_messages([message_id]):
                yield _read(message)

    def _push(
        self,
        kind: str,
        content: RecordDict,
        node_ids: Sequence[int],
        round_number: int,
        ttl_s: float,
    ) -> dict[int, str]:
        # One content for all: its arrays are uploaded and stored once.
        messages = [
            Message(content, node_id, kind, ttl=ttl_s, group_id=str(round_number))
            for node_id in node_ids
        ]
        ids = list(self._grid.push_messages(messages))
        if len(ids) == len(messages):
            return {node: id_ for node, id_ in zip(node_ids, ids, strict=True) if id_}
        # Flower's Grid in memory leaves refused messages out; it wrote its ids into the others.
        accepted = set(ids)
        return {
            message.metadata.dst_node_id: message.metadata.message_id
            for message in messages
            if message.metadata.message_id in accepted
        }


def _read(message: Message) -> Reply:
    # Errors that the SuperLink makes come from node 1: only this id says whose reply it is.
    message_id = message.metadata.reply_to_message_id
    if message.has_error():
        code = message.error.code
        return Reply(message_id, failure=_in_words(message.error), gone=code == _NODE_UNAVAILABLE)
    try:
        return Reply(
            message_id,
            parameters=_parameters_in(message.content),
            statistics=_statistics_in(message.content),
        )
    except PeerError as error:
        return Reply(message_id, failure=str(error))


def _in_words(error: Error) -> str:
    """Return the client's own last word, which in a traceback is the error itself."""
    lines = (error.reason or "").strip().splitlines()
    if error.code == _NODE_UNAVAILABLE or not lines:
        return _ERROR_WORDS.get(error.code, f"Flower's error {error.code}")
    return lines[-1].strip()[:_CAUSE_LENGTH]


def _parameters_in(content: RecordDict) -> Vector | None:
    record = content.array_records.get("parameters")
    if record is None:
        return None
    arrays = list(record.values())
    if len(arrays) != 1:
        raise PeerError(f"the reply holds {len(arrays)} arrays in place of one vector")
    return _vector_of(arrays[0])


def _vector_of(array: Array) -> Vector:
    """Read the array without a copy, and without allocating what its header merely claims.

    numpy's own reader evaluates the header as Python, which takes down whoever reads a hostile one.
    """
    header = _VECTOR_HEADER.match(array.data)
    if header is None or header.end() != _BEFORE_HEADER + int.from_bytes(header[1], "little"):
        raise PeerError("the reply's vector is not in numpy's format 1.0")
    dtype, shape = header[2].decode("ascii"), header[3].decode("ascii")
    size = (len(array.data) - header.end()) // 4
    if dtype != "<f4" or shape != f"{size},":
        raise PeerError(f"the reply holds {dtype} of shape ({shape}) in place of a float32 vector")
    return np.frombuffer(array.data, dtype=np.float32, offset=header.end(), count=size)


def _statistics_in(content: RecordDict) -> dict[str, float]:
    record = content.metric_records.get("metrics")
    if record is None:
        raise PeerError("the reply holds no metrics")
    statistics = {}
    for name, value in record.items():
        if not isinstance(value, int | float):
            raise PeerError(f"the statistic {name[:64]!r} is not a number")
        statistics[name] = float(value)
    return statistics
