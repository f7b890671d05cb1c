"""The records of Flower messages that secure sums travel in; see training_app.py.

A message that asks for a vector holds the record ``sum`` with the sealed ``config``; one that asks
for a later stage, ``session`` and ``question``. Replies hold ``sum`` with ``answer``, and with a
masked vector the arrays ``lanes`` and ``exact``: nothing else about the data leaves a device.
"""

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from shared.errors import PeerError
from shared.secure_sum.masking import Lanes

_RECORD = "sum"


def sealed_config_in(content: RecordDict) -> bytes | None:
    """Return the sealed configuration; None where the message is no part of a secure sum.

    Raises:
        PeerError: there is such a record, and it is not what it should be.
    """
    record = content.config_records.get(_RECORD)
    return None if record is None else _bytes_in(record, "config")


def stage_question_in(content: RecordDict) -> tuple[bytes, bytes]:
    """Return the session and the question of a later stage; raise PeerError where one lacks."""
    record = content.config_records.get(_RECORD, ConfigRecord())
    return _bytes_in(record, "session"), _bytes_in(record, "question")


def reply_with(answer: bytes, lanes: Lanes | None = None) -> RecordDict:
    """Return a reply's content: a signed answer and, at the stage "mask", the masked vector."""
    content = RecordDict({_RECORD: ConfigRecord({"answer": answer})})
    if lanes is not None:
        content["lanes"] = ArrayRecord([lanes.main])
        content["exact"] = ArrayRecord([lanes.exact])
    return content


def _bytes_in(record: ConfigRecord, name: str) -> bytes:
    value = record.get(name)
    if not isinstance(value, bytes):
        raise PeerError(f"the message's record {_RECORD!r} holds no {name}")
    return value
