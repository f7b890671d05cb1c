"""Which commands were taken already, so that one that arrives twice has one effect."""

from datetime import datetime

from edge_agent.state import AgentState


class Inbox:
    """The table ``seen``: ids of messages, each kept until no valid copy can arrive any more."""

    def __init__(self, state: AgentState) -> None:
        self._state = state

    def take(self, message_id: str, *, until: datetime, now: datetime) -> bool:
        """Remember ``message_id``; return False if it was taken before.

        It is remembered before it is acted upon: a crash in between loses a command, which its
        sender repeats as a new message, and never runs one twice.
        """
        with self._state.transaction() as connection:
            connection.execute("DELETE FROM seen WHERE until <= ?", (now.timestamp(),))
            added = connection.execute(
                "INSERT OR IGNORE INTO seen (message_id, until) VALUES (?, ?)",
                (message_id, until.timestamp()),
            )
        return added.rowcount == 1
