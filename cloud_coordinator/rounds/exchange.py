"""The rounds' door to Flower: questions to devices and their replies, as values of our own.

Only Flower's public Message API is used, so this works over any `Grid`: our `RunGrid`, Flower's
`HttpGrid`, and the one in memory of its simulation engine.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from shared.errors import PeerError
from shared.judging import MAX_CANDIDATES, MAX_FACTS_BYTES, CandidateFacts
from shared.npy import read_vector
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import SignedAnswer, Stage, decode
from shared.student_plan import StudentPlan, encode_student
from shared.untrusted import NOT_JSON

_CAUSE_LENGTH = 300
_NODE_UNAVAILABLE = 5  # Flower's error code for a node that missed its heartbeats
_LANE_TYPES = {"<u2": np.uint16, "<u4": np.uint32}
_ERROR_WORDS = {  # what Flower's codes mean, for errors that come without a reason
    1: "its ClientApp could not be loaded",
    2: "its ClientApp raised an error",
    3: "the message expired before it was answered",
    4: "the reply expired before it was complete",
    _NODE_UNAVAILABLE: "its node missed its heartbeats",
    7: "it could not use the app bundle",
    8: "its ClientApp ended abruptly",
}

Records = dict[str, ArrayRecord | ConfigRecord]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one message: an answer, or why there is none."""

    message_id: str  # of the question
    failure: str = ""  # in words; empty for an answer
    gone: bool = False  # of a failure: the device is away
    parameters: Vector | None = None  # shape (d,); of plain rounds
    statistics: Mapping[str, float] = field(default_factory=dict)
    answer: SignedAnswer | None = None  # of a secure sum; only its form is checked
    lanes: Lanes | None = field(default=None, repr=False)  # read-only
    facts: tuple[CandidateFacts, ...] = ()  # of judged files, on that machine

    @property
    def nbytes(self) -> int:
        """Size of what counts: vectors and answers."""
        size = 0 if self.parameters is None else self.parameters.nbytes
        if self.answer is not None:
            size += len(self.answer.body)
        if self.lanes is not None:
            size += self.lanes.main.nbytes + self.lanes.exact.nbytes
        return size


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
        configs: Mapping[int, bytes] = {},
        student: StudentPlan | None = None,
        teacher: Vector | None = None,
    ) -> dict[int, str]:
        """Ask nodes to train from ``parameters``, shape (d,).

        Args:
            parameters: what to start from.
            plan: how to train.
            node_ids: whom to ask.
            round_number: for their records.
            seed: of the round.
            min_examples: a device with fewer refuses.
            ttl_s: how long the message lives.
            configs: by node: the sealed configuration of the secure sum that its update goes into;
                a node without one replies with the update itself.
            student: which network; None: the task's own.
            teacher: parameters of the task's own network, shape (e,), that the student learns from.

        Returns:
            The id of each node's message, which its reply names; nodes whose message was refused
            are missing.
        """
        record = ConfigRecord(
            {
                "json": encode_plan(plan).decode(),
                "round": round_number,
                "seed": seed,
                "min_examples": min_examples,
            }
        )
        base: Records = {"parameters": ArrayRecord([parameters]), "plan": record}
        base |= _of_student(student)
        if teacher is not None:
            base["teacher"] = ArrayRecord([teacher])
        contents = _with_configs(base, node_ids, configs)
        return self._push(MessageType.TRAIN, contents, round_number, ttl_s)

    def ask_to_evaluate(
        self,
        parameters: Vector,
        node_ids: Sequence[int],
        *,
        round_number: int,
        ttl_s: float,
        configs: Mapping[int, bytes] = {},
        student: StudentPlan | None = None,
    ) -> dict[int, str]:
        """Ask nodes to measure ``parameters`` on their held-out rows; as `ask_to_train`."""
        base: Records = {"parameters": ArrayRecord([parameters]), **_of_student(student)}
        contents = _with_configs(base, node_ids, configs)
        return self._push(MessageType.EVALUATE, contents, round_number, ttl_s)

    def ask_for_statistics(
        self,
        question: bytes,
        node_ids: Sequence[int],
        *,
        round_number: int,
        ttl_s: float,
        configs: Mapping[int, bytes],
        model: bytes | None = None,
    ) -> dict[int, str]:
        """Ask nodes what their rows are like, or what these do to ``model``; as `ask_to_train`.

        ``question`` is JSON.
        """
        base: Records = {"statistics": ConfigRecord({"json": question.decode()})}
        if model is not None:
            base["model"] = ArrayRecord([np.frombuffer(model, np.uint8)])
        contents = _with_configs(base, node_ids, configs)
        return self._push(f"{MessageType.QUERY}.statistics", contents, round_number, ttl_s)

    def ask_to_judge(
        self,
        question: bytes,
        files: Sequence[bytes],
        node_ids: Sequence[int],
        *,
        round_number: int,
        ttl_s: float,
        configs: Mapping[int, bytes],
    ) -> dict[int, str]:
        """Ask nodes how good ``files`` are on their held-out rows; as `ask_to_train`.

        ``question`` is JSON.
        """
        base: Records = {
            "question": ConfigRecord({"json": question.decode()}),
            "files": ArrayRecord([np.frombuffer(file, np.uint8) for file in files]),
        }
        contents = _with_configs(base, node_ids, configs)
        return self._push(f"{MessageType.QUERY}.judge", contents, round_number, ttl_s)

    def ask_stage(
        self,
        stage: Stage,
        questions: Mapping[int, tuple[bytes, bytes]],
        *,
        round_number: int,
        ttl_s: float,
    ) -> dict[int, str]:
        """Ask nodes one question of a secure sum; returns as `ask_to_train`.

        Args:
            stage: which.
            questions: by node: its session, and the question.
            round_number: groups the messages.
            ttl_s: how long they live.
        """
        contents = {
            node_id: RecordDict({"sum": ConfigRecord({"session": session, "question": question})})
            for node_id, (session, question) in questions.items()
        }
        return self._push(f"{MessageType.QUERY}.{stage}", contents, round_number, ttl_s)

    def replies(self, message_ids: Iterable[str]) -> Iterator[Reply]:
        """Pull what is there, one reply at a time, each only when the caller is done with the last.

        A message that was answered must not be asked for again: the answer would be an error.
        """
        for message_id in message_ids:
            for message in self._grid.pull_messages([message_id]):
                yield _read(message)

    def _push(
        self, kind: str, contents: Mapping[int, RecordDict], round_number: int, ttl_s: float
    ) -> dict[int, str]:
        # Equal records are uploaded and stored once, whatever messages they are part of.
        node_ids = list(contents)
        messages = [
            Message(content, node_id, kind, ttl=ttl_s, group_id=str(round_number))
            for node_id, content in contents.items()
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
        if (record := message.content.config_records.get("sum")) is not None:
            return Reply(
                message_id,
                answer=_answer_in(record),
                lanes=_lanes_in(message.content),
                facts=_facts_in(message.content),
            )
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


def encode_plan(plan: TrainingPlan) -> bytes:
    """Return the JSON that travels; a device's question digest is over these bytes."""
    return msgspec.json.encode(plan)


def _of_student(student: StudentPlan | None) -> Records:
    if student is None:
        return {}
    return {"student": ConfigRecord({"json": encode_student(student).decode()})}


def _with_configs(
    base: Records,
    node_ids: Sequence[int],
    configs: Mapping[int, bytes],
) -> dict[int, RecordDict]:
    """Return each node's content: one object for all that are told the same."""
    contents: dict[bytes | None, RecordDict] = {}
    for config in {configs.get(node_id): None for node_id in node_ids}:
        sums = {} if config is None else {"sum": ConfigRecord({"config": config})}
        contents[config] = RecordDict({**base, **sums})
    return {node_id: contents[configs.get(node_id)] for node_id in node_ids}


def _answer_in(record: ConfigRecord) -> SignedAnswer:
    answer = record.get("answer")
    if not isinstance(answer, bytes):
        raise PeerError("the reply holds no answer to a secure sum")
    return decode(answer, SignedAnswer)


def _facts_in(content: RecordDict) -> tuple[CandidateFacts, ...]:
    record = content.config_records.get("facts")
    if record is None:
        return ()
    text = record.get("json")
    if not isinstance(text, bytes) or len(text) > MAX_FACTS_BYTES:
        raise PeerError("the reply's facts are none, or too many")
    try:
        facts = msgspec.json.decode(text, type=tuple[CandidateFacts, ...])
    except NOT_JSON as error:
        raise PeerError(f"the reply's facts cannot be read: {error}") from error
    if len(facts) > MAX_CANDIDATES:
        raise PeerError(f"the reply has facts of {len(facts)} files")
    return facts


def _lanes_in(content: RecordDict) -> Lanes | None:
    main, exact = _only_array(content, "lanes"), _only_array(content, "exact")
    if main is None and exact is None:
        return None
    if main is None or exact is None:
        raise PeerError("the reply holds only one of the two arrays of a masked vector")
    return Lanes(main=_array_of(main, _LANE_TYPES), exact=_array_of(exact, {"<u8": np.uint64}))


def _parameters_in(content: RecordDict) -> Vector | None:
    array = _only_array(content, "parameters")
    return None if array is None else _array_of(array, {"<f4": np.float32})


def _only_array(content: RecordDict, name: str) -> Array | None:
    record = content.array_records.get(name)
    if record is None:
        return None
    arrays = list(record.values())
    if len(arrays) != 1:
        raise PeerError(f"the reply holds {len(arrays)} arrays in place of one vector")
    return arrays[0]


def _array_of(array: Array, types: Mapping[str, Any]) -> Any:
    return read_vector(array.data, types, what="the reply")


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
