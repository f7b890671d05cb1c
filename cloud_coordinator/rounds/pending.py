"""The sum that is not finished, on disk: what a new life of the worker needs to finish it.

Devices send a vector once. So a session whose vectors are on their way is resumed after a crash,
never run again: each question of it that has been asked is written down before it is asked. The
files hold the session's private key; they are for their owner only, replaced in one step, and
removed once the round is saved.
"""

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from cloud_coordinator.rounds.worker_messages import Participation
from shared.files import write_private
from shared.secure_sum.config import Purpose

logger = logging.getLogger(__name__)


class PendingGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One of the sums that are made side by side.

    Attributes:
        config: the configuration's payload.
        names: what the roster of the worker calls each device, by device id.
        snapshot: of the `SumServer`; empty where the session is over.
        cause: why the session ended without a sum.
        main, exact: the sum's lanes, where it is known.
        survivors: how many vectors are in it.
    """

    group: int
    config: bytes
    names: dict[str, str]
    snapshot: bytes = b""
    cause: str = ""
    roster: int = 0
    main: bytes = b""
    exact: bytes = b""
    survivors: int = 0
    corrupted: int = 0
    threshold: int = 0

    def __repr__(self) -> str:
        return f"PendingGroup(group={self.group})"


class PendingSum(msgspec.Struct, frozen=True, kw_only=True):
    """All sums of one question of one round."""

    v: int = 1
    round_number: int
    purpose: Purpose
    started_at: datetime
    groups: tuple[PendingGroup, ...]
    participations: tuple[Participation, ...]
    blamed: dict[str, str] = {}
    stage_seconds: dict[str, float] = {}


class Scratch:
    """The files of one run; without a folder nothing is kept, and a crash loses the sum."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._folder is not None

    def save(self, pending: PendingSum) -> None:
        """Replace what is known of this sum, durable before it returns."""
        self._write(f"{pending.purpose}.sum", pending)

    def save_boxes(self, purpose: Purpose, boxes: dict[str, bytes]) -> None:
        """Keep what each device is asked when it masks, by device id."""
        self._write(f"{purpose}.boxes", boxes)

    def load(self, purpose: Purpose, round_number: int) -> PendingSum | None:
        """Return the unfinished sum of a round; None where there is none."""
        pending: PendingSum | None = self._read(f"{purpose}.sum", PendingSum)
        return pending if pending and pending.round_number == round_number else None

    def load_boxes(self, purpose: Purpose) -> dict[str, bytes]:
        """Return what `save_boxes` kept."""
        return self._read(f"{purpose}.boxes", dict[str, bytes]) or {}

    def save_groups(self, purpose: Purpose, groups: tuple[tuple[str, ...], ...]) -> None:
        """Keep who is summed with whom in this run."""
        self._write(f"{purpose}.groups", groups)

    def load_groups(self, purpose: Purpose) -> tuple[tuple[str, ...], ...]:
        """Return what `save_groups` kept."""
        return self._read(f"{purpose}.groups", tuple[tuple[str, ...], ...]) or ()

    def forget_sums(self) -> None:
        """Remove the sums, since their round is saved."""
        for pattern in ("*.sum", "*.boxes"):
            for path in self._folder.glob(pattern) if self._folder else ():
                path.unlink(missing_ok=True)

    def _write(self, name: str, content: object) -> None:
        if self._folder is not None:
            write_private(self._folder / name, msgspec.msgpack.encode(content))

    def _read(self, name: str, kind: Any) -> Any:
        if self._folder is None or not (path := self._folder / name).exists():
            return None
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=kind)
        except (msgspec.DecodeError, OSError) as error:
            logger.warning("%s cannot be used and is left aside: %s", path, error)
            return None
