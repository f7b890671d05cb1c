"""What this device remembers of each session, so that it never answers twice (R1, R8, R16).

Functions over one transaction of the store, so that what belongs together is kept together: a
vector is spent, paid for and on its way in one step.
"""

import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from edge_agent.privacy.lifecycle import TERMINAL, SumEvent, SumState, next_state
from edge_agent.privacy.sources import DataUse
from shared.errors import PeerError, PolicyError
from shared.secure_sum.config import SumConfig
from shared.secure_sum.questions import SPENT

_REMEMBERED = timedelta(days=30)  # longer than any session may last, see proposal.py


@dataclass(frozen=True, slots=True)
class KnownSession:
    """What the disk knows of a session whose secrets are gone, enough to refuse in its name."""

    state: SumState
    cause: str
    config_digest: bytes


def open_session(
    connection: sqlite3.Connection,
    config: SumConfig,
    *,
    config_digest: bytes,
    holder: str,
    now: datetime,
) -> None:
    """Note a new session.

    Raises:
        PeerError: it was opened before, by whichever process.
    """
    if known_session(connection, config.session) is not None:
        raise PeerError("this session was opened before; a session is opened once")
    connection.execute(
        "INSERT INTO sessions (session, holder, state, run_id, round_number, purpose, "
        "group_number, config_digest, opened_at, changed_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            config.session,
            holder,
            SumState.OPENED,
            config.run_id,
            config.round_number,
            config.purpose,
            config.group,
            config_digest,
            now.timestamp(),
            now.timestamp(),
        ),
    )


def known_session(connection: sqlite3.Connection, session: bytes) -> KnownSession | None:
    """Return what is known of a session, or None where it was never opened here."""
    row = connection.execute(
        "SELECT state, cause, config_digest FROM sessions WHERE session = ?",
        (session,),
    ).fetchone()
    return None if row is None else KnownSession(SumState(row[0]), *row[1:])


def forget_old_sessions(connection: sqlite3.Connection, *, now: datetime) -> None:
    """Forget sessions that ended so long ago that their configuration is expired for certain."""
    marks = ", ".join("?" * len(TERMINAL))
    connection.execute(
        f"DELETE FROM sessions WHERE state IN ({marks}) AND changed_at < ?",  # noqa: S608  # question marks alone
        (*sorted(TERMINAL), (now - _REMEMBERED).timestamp()),
    )


def advance(
    connection: sqlite3.Connection,
    session: bytes,
    event: SumEvent,
    *,
    now: datetime,
    cause: str = "",
) -> None:
    """Let ``event`` happen to a session; raise IllegalTransitionError where it cannot."""
    known = known_session(connection, session)
    assert known is not None, "only opened sessions advance"
    connection.execute(
        "UPDATE sessions SET state = ?, cause = ?, changed_at = ? WHERE session = ?",
        (next_state(known.state, event), cause, now.timestamp(), session),
    )


def end_orphans(
    connection: sqlite3.Connection, is_alive: Callable[[str], bool], *, now: datetime
) -> None:
    """Note as lost all sessions that are not over, but whose process is."""
    marks = ", ".join("?" * len(TERMINAL))
    rows = connection.execute(
        f"SELECT session, state, holder FROM sessions WHERE state NOT IN ({marks})",  # noqa: S608  # question marks alone
        sorted(TERMINAL),
    ).fetchall()
    for session, state, holder in rows:
        if not is_alive(holder):
            cause = f"this device's trainer ended while the session was {state}"
            advance(connection, session, SumEvent.PROCESS_ENDED, now=now, cause=cause)


# --- rounds: a run only goes on, in the group that it began with --------------------------------


def check_round(connection: sqlite3.Connection, config: SumConfig) -> None:
    """Refuse to go back in a run, and to be moved between its groups.

    Sums without noise over ever new groups can be solved for each device (R4).

    Raises:
        PeerError: the round is before one that this device sent a vector for, or in an exact sum
            the group is another one.
    """
    row = connection.execute(
        "SELECT round_number, group_number FROM rounds WHERE run_id = ? AND purpose = ?",
        (config.run_id, config.purpose),
    ).fetchone()
    if row is None:
        return
    last_round, group = row
    if config.round_number < last_round:
        raise PeerError(
            f"round {config.round_number} of run {config.run_id} is over: "
            f"this device sent a vector for round {last_round}"
        )
    if config.noise is None and config.group != group:
        raise PeerError(
            f"this device is in group {group} of run {config.run_id} for good, "
            f"and this sum is of group {config.group}"
        )


def note_round(connection: sqlite3.Connection, config: SumConfig) -> None:
    """Note that a vector is about to leave for this round."""
    connection.execute(
        "INSERT OR REPLACE INTO rounds (run_id, purpose, round_number, group_number) "
        "VALUES (?, ?, ?, ?)",
        (config.run_id, config.purpose, config.round_number, config.group),
    )


# --- spent: no second exact vector for one question ----------------------------------------------


def check_unspent(connection: sqlite3.Connection, config: SumConfig, data: DataUse) -> None:
    """Refuse a second vector for one question, under whatever session and round.

    The difference of two sums that differ in one device is that device's vector, however freshly
    it was trained and rounded. With noise a second vector is another full charge instead.

    Raises:
        PeerError: a vector was sent for it already.
    """
    if config.noise is not None:
        return
    row = connection.execute(
        "SELECT 1 FROM spent WHERE data_id = ? AND part = ? AND run_id = ? "
        "AND base_digest = ? AND question_digest = ?",
        _spent_key(config, data),
    ).fetchone()
    if row is not None:
        raise PeerError(f"{SPENT}, and a session that was interrupted can only be resumed")


def spend(connection: sqlite3.Connection, config: SumConfig, data: DataUse) -> None:
    """Note that the vector for this question is about to leave."""
    connection.execute(
        "INSERT OR IGNORE INTO spent (data_id, part, run_id, base_digest, question_digest, session)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (*_spent_key(config, data), config.session),
    )


def _spent_key(config: SumConfig, data: DataUse) -> tuple[str, str, str, str, str]:
    base = config.base_digest or ""
    return data.data_id, data.part, config.run_id, base, config.question_digest


# --- survivors: no two exact sums that differ in few devices -------------------------------------


def note_survivors(
    connection: sqlite3.Connection,
    config: SumConfig,
    data: DataUse,
    survivors: Collection[str],
    *,
    min_difference: int,
) -> None:
    """Note whose vectors are in an exact sum, unless it differs too little from an earlier one.

    Statistics are compared with every earlier statistic on the same version of the data, whatever
    was asked, since a changed bin edge asks the same again; the others with those from the same
    parameters. This stops the simple differencing attack only.

    Raises:
        PolicyError: an earlier set differs by fewer than ``min_difference`` devices, but by some.
    """
    if config.noise is not None:
        return
    base = "" if config.purpose == "statistics" else config.base_digest or ""
    rows = connection.execute(
        "SELECT members FROM survivors WHERE data_id = ? AND part = ? AND digest = ? "
        "AND purpose = ? AND base_digest = ?",
        (data.data_id, data.part, data.digest, config.purpose, base),
    )
    for (members,) in rows:
        difference = len(set(survivors) ^ set(msgspec.json.decode(members, type=list[str])))
        if 0 < difference < min_difference:
            raise PolicyError(
                f"the survivors differ by {difference} devices from those of an earlier exact sum "
                f"on the same data, and this device's owner wants {min_difference}"
            )
    connection.execute(
        "INSERT INTO survivors (session, data_id, part, digest, purpose, base_digest, members) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            config.session,
            data.data_id,
            data.part,
            data.digest,
            config.purpose,
            base,
            msgspec.json.encode(sorted(survivors)).decode(),
        ),
    )
