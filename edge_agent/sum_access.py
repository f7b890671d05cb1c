"""How a ClientApp reaches this device's secure sums, wherever they are kept.

In our trainer, which is one process for a whole run, that is the `SecureSums` of that process.
Stock SuperNodes start a process for each message, and Flower's simulation engine hands a node's
messages to whichever worker is free; there a keeper holds them (see sum_keeper.py).
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from edge_agent.privacy.sources import DataUse, Part
from edge_agent.secure_sums import OpenSum, SecureSums
from shared.errors import PeerError
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import Stage


class Sums(Protocol):
    """What `SecureSums` offers; its docstrings say what may be raised."""

    def data_use(self, *, name: str, path: str, digest: str, part: Part) -> DataUse:
        """Return under which account the owner's data are booked."""
        ...

    def open(
        self,
        sealed_config: bytes,
        *,
        task_digest: str,
        question_digest: str,
        base_digest: str | None,
        data: DataUse,
    ) -> OpenSum:
        """Check all that can be checked before the vector is made."""
        ...

    def advertise(
        self, opened: OpenSum, vector: NDArray[Any] | None, exact: Mapping[str, float]
    ) -> bytes:
        """Keep the vector until it is masked, and answer with fresh keys."""
        ...

    def decline(self, opened: OpenSum, reason: str) -> bytes:
        """Say no, since the vector could not be made."""
        ...

    def answer(self, session: bytes, stage: Stage, question: bytes) -> bytes:
        """Answer the stages "share", "consent" and "reveal"."""
        ...

    def mask(self, session: bytes, question: bytes) -> tuple[bytes, Lanes | None]:
        """Hand out the masked vector, or a signed refusal."""
        ...

    def allow_plain_update(self, run_id: str, round_number: int, data: DataUse) -> None:
        """Book what leaves by itself, in no sum; raise PolicyError where it may not."""
        ...


class NoOwner:
    """For simulations of plain rounds on data that are nobody's: all may leave, nothing is summed.

    Never for a device.
    """

    def data_use(self, *, name: str, path: str, digest: str, part: Part) -> DataUse:
        """Return an account that nobody keeps."""
        return DataUse(name or path, part, digest)

    def open(self, *_: object, **__: object) -> OpenSum:
        """Refuse."""
        raise PeerError("this simulated device is not enrolled, and takes part in no secure sum")

    def advertise(self, *_: object) -> bytes:
        """Refuse."""
        raise PeerError("no such session was opened here")

    decline = answer = advertise

    def mask(self, *_: object) -> tuple[bytes, Lanes | None]:
        """Refuse."""
        raise PeerError("no such session was opened here")

    def allow_plain_update(self, *_: object) -> None:
        """Let it leave."""


_opened: dict[Path, SecureSums] = {}
_opening = threading.Lock()


def sums_of_process(home: Path) -> SecureSums:
    """Return this process's sums of the agent at ``home``, the same to every thread.

    Raises:
        ConfigError: it is not enrolled.
        UnavailableError: its database cannot be used.
    """
    with _opening:
        if home not in _opened:
            _opened[home] = SecureSums(home)
        return _opened[home]
