"""What the daemon says to its inference children, and what they answer, as JSON lines.

Every answer repeats the ``ticket`` of its command: slots are reused, so a path alone would not tell
the answer to this command from a late one to an earlier.
"""

import msgspec

RESTORING = 0  # ticket of commands that nobody waits for: a fresh child gets its model back


class Activate(msgspec.Struct, frozen=True, kw_only=True, tag="activate"):
    """Load this slot beside the running model, check it, and switch to it."""

    ticket: int
    slot: str  # path of the slot's folder


class ServerReady(msgspec.Struct, frozen=True, tag="ready"):
    """The listener answers; nothing is served yet."""


class Activated(msgspec.Struct, frozen=True, kw_only=True, tag="activated"):
    """This is what is served from now on; the model before it is drained and gone."""

    ticket: int
    model: str
    version: str  # digest of the manifest
    artifact: str  # digest of the file
    variant: str  # what the manifest calls it


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The slot does not work here; whatever was served before is still served."""

    ticket: int
    cause: str


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Counts of this child, said when they changed; latencies are from first byte to last."""

    requests: int  # since it started
    errors: int  # requests that failed by our fault; a client's mistakes are not among them
    version: str  # what is served; the rest is counted since it took over
    version_requests: int
    version_errors: int
    p50_ms: float | None
    p95_ms: float | None
    labelled: int = 0  # rows of the version served now for which a label came back
    correct: int = 0  # rows among them that were right


FromServer = ServerReady | Activated | Refused | Stats


class SelfTestResult(msgspec.Struct, frozen=True, kw_only=True, tag="passed"):
    """What a self-test measured on this device."""

    version: str  # digest of the manifest
    artifact: str  # digest of the bytes that were loaded
    provider: str  # ONNX Runtime's execution provider
    load_ms: float
    p50_ms: float  # of one row, in process
    largest_difference: float  # from the golden outputs, in units of the output
    peak_memory_bytes: int  # resident


class SelfTestRefusal(msgspec.Struct, frozen=True, tag="refused"):
    """Why the model is not fit for this device."""

    cause: str


SelfTestAnswer = SelfTestResult | SelfTestRefusal
