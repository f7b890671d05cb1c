"""Messages that must reach the coordinator, kept until it says that it stored them.

A broker's acknowledgement is not enough: brokers lose what they acknowledged when they restart or
when a queue overflows. So a message leaves this table only with the coordinator's `Ack`, is sent
again after each connect, and the coordinator drops the copies by their id.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_agent.state import AgentState

logger = logging.getLogger(__name__)

_MAX_ROWS = 10_000
_MAX_BYTES = 50 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Waiting:
    """One message that waits for its acknowledgement."""

    message_id: str
    topic: str
    payload: bytes
    expires_at: datetime


class Outbox:
    """The table ``outbox``, bounded; when it is full the oldest messages go first."""

    def __init__(
        self, state: AgentState, *, max_rows: int = _MAX_ROWS, max_bytes: int = _MAX_BYTES
    ) -> None:
        self._state = state
        self._max_rows = max_rows
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        with self._state.transaction() as connection:
            (rows,) = connection.execute("SELECT count(*) FROM outbox").fetchone()
        return int(rows)

    def add(self, message: Waiting) -> None:
        """Keep ``message``, durable before this returns; a second copy of it changes nothing.

        Raises:
            UnavailableError: the disk is full.
        """
        with self._state.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO outbox (message_id, topic, payload, expires_at) "
                "VALUES (?, ?, ?, ?)",
                (
                    message.message_id,
                    message.topic,
                    message.payload,
                    message.expires_at.timestamp(),
                ),
            )
            rows, size = connection.execute(
                "SELECT count(*), total(length(payload)) FROM outbox"
            ).fetchone()
            while rows > self._max_rows or size > self._max_bytes:
                number, length = connection.execute(
                    "SELECT number, length(payload) FROM outbox ORDER BY number LIMIT 1"
                ).fetchone()
                connection.execute("DELETE FROM outbox WHERE number = ?", (number,))
                rows, size = rows - 1, size - length
                logger.warning("the outbox is full: the oldest message was given up")

    def forget_expired(self, now: datetime) -> None:
        """Drop what nobody would accept any more."""
        with self._state.transaction() as connection:
            connection.execute("DELETE FROM outbox WHERE expires_at <= ?", (now.timestamp(),))

    def acknowledge(self, message_ids: Iterable[str]) -> None:
        """Forget messages that are durable at the coordinator."""
        with self._state.transaction() as connection:
            connection.executemany(
                "DELETE FROM outbox WHERE message_id = ?", [(key,) for key in message_ids]
            )

    def waiting(self, now: datetime) -> Iterator[Waiting]:
        """Yield what waits and has not expired, oldest first, one row in memory at a time."""
        number = 0
        while True:
            with self._state.transaction() as connection:
                row = connection.execute(
                    "SELECT number, message_id, topic, payload, expires_at FROM outbox "
                    "WHERE number > ? AND expires_at > ? ORDER BY number LIMIT 1",
                    (number, now.timestamp()),
                ).fetchone()
            if row is None:
                return
            number = row[0]
            yield Waiting(row[1], row[2], row[3], datetime.fromtimestamp(row[4], UTC))
