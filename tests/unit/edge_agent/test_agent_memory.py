"""What the agent keeps in its database: outbox, inbox, facts, and who may write."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from edge_agent.inbox import Inbox
from edge_agent.outbox import Outbox, Waiting
from edge_agent.state import AgentState, is_running, only_agent_of
from shared.errors import ConflictError, UnavailableError

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


class Fact(msgspec.Struct, frozen=True):
    number: int = 0


@pytest.fixture
def state(tmp_path: Path) -> Iterator[AgentState]:
    with AgentState(tmp_path / "state.db") as opened:
        yield opened


def message(number: int, *, size: int = 10, expires_at: datetime = LATER) -> Waiting:
    return Waiting(f"id-{number}", "topic", bytes(size), expires_at)


def ids(outbox: Outbox) -> list[str]:
    return [waiting.message_id for waiting in outbox.waiting(NOW)]


def test_messages_wait_in_order_until_they_are_acknowledged(state: AgentState) -> None:
    outbox = Outbox(state)
    for number in range(3):
        outbox.add(message(number))
    outbox.acknowledge(["id-1", "never-sent"])
    assert ids(outbox) == ["id-0", "id-2"]


def test_a_message_comes_back_as_it_was_given(state: AgentState) -> None:
    waiting = Waiting("id", "shoal/v1/x", b"\x00payload", LATER)
    Outbox(state).add(waiting)
    assert list(Outbox(state).waiting(NOW)) == [waiting]


def test_the_same_message_twice_waits_once(state: AgentState) -> None:
    outbox = Outbox(state)
    outbox.add(message(1))
    outbox.add(message(1))
    assert len(outbox) == 1


def test_what_expired_is_dropped(state: AgentState) -> None:
    outbox = Outbox(state)
    outbox.add(message(1, expires_at=NOW))
    outbox.add(message(2))
    assert ids(outbox) == ["id-2"]
    outbox.forget_expired(NOW)
    assert len(outbox) == 1


def test_a_full_outbox_gives_up_the_oldest_by_count(state: AgentState) -> None:
    outbox = Outbox(state, max_rows=3)
    for number in range(5):
        outbox.add(message(number))
    assert ids(outbox) == ["id-2", "id-3", "id-4"]


def test_a_full_outbox_gives_up_the_oldest_by_size(state: AgentState) -> None:
    outbox = Outbox(state, max_bytes=100)
    for number in range(3):
        outbox.add(message(number, size=40))
    assert ids(outbox) == ["id-1", "id-2"]


def test_messages_may_be_acknowledged_while_they_are_repeated(state: AgentState) -> None:
    outbox = Outbox(state)
    for number in range(4):
        outbox.add(message(number))
    repeated = []
    for waiting in outbox.waiting(NOW):
        repeated.append(waiting.message_id)
        outbox.acknowledge(["id-0", "id-2"])
    assert repeated == ["id-0", "id-1", "id-3"]


def test_a_command_is_taken_once_even_over_a_restart(tmp_path: Path) -> None:
    with AgentState(tmp_path / "state.db") as state:
        assert Inbox(state).take("command", until=LATER, now=NOW)
        assert not Inbox(state).take("command", until=LATER, now=NOW)
    with AgentState(tmp_path / "state.db") as state:
        assert not Inbox(state).take("command", until=LATER, now=NOW)


def test_a_command_is_forgotten_when_no_valid_copy_can_come(state: AgentState) -> None:
    inbox = Inbox(state)
    inbox.take("old", until=NOW, now=NOW)
    inbox.take("new", until=LATER, now=NOW + timedelta(seconds=1))
    with state.transaction() as connection:
        rows = connection.execute("SELECT message_id FROM seen").fetchall()
    assert rows == [("new",)]


def test_facts_are_replaced_and_absent_before_the_first(state: AgentState) -> None:
    assert state.read("fact", Fact) is None
    state.write("fact", Fact(1))
    state.write("fact", Fact(2))
    assert state.read("fact", Fact) == Fact(2)


def test_a_transaction_is_all_or_nothing(state: AgentState) -> None:
    with contextlib.suppress(RuntimeError), state.transaction() as connection:
        connection.execute("INSERT INTO facts VALUES ('fact', '{}')")
        raise RuntimeError
    assert state.read("fact", Fact) is None


def test_a_damaged_database_is_named_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(UnavailableError, match=r"is damaged .* move it away"):
        AgentState(tmp_path / "state.db")


def test_a_database_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UnavailableError, match="newer shoal-agent"):
        AgentState(tmp_path / "state.db")


def test_a_full_disk_is_said_in_a_sentence(state: AgentState) -> None:
    with state.transaction() as connection:
        connection.execute("PRAGMA max_page_count = 20")
    outbox = Outbox(state)
    outbox.add(message(0))
    with pytest.raises(UnavailableError, match="free some disk space"):
        outbox.add(message(1, size=100 * 4096))
    assert ids(outbox) == ["id-0"]


def test_one_home_has_one_daemon(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with only_agent_of(tmp_path):
        assert is_running(tmp_path)
        with pytest.raises(ConflictError, match="stop it first"), only_agent_of(tmp_path):
            pass
    assert not is_running(tmp_path)


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from edge_agent.outbox import Outbox, Waiting
from edge_agent.state import AgentState

life = sys.argv[2]
with AgentState(Path(sys.argv[1])) as state:
    outbox = Outbox(state, max_rows=1_000_000)
    for number in range(1_000_000):
        key = f"{life}-{number}"
        outbox.add(Waiting(key, "topic", b"x" * 200, datetime(2100, 1, 1, tzinfo=UTC)))
        print(key, flush=True)
"""


def test_thirty_killed_writers_lose_no_message_that_was_kept(tmp_path: Path) -> None:
    database = tmp_path / "state.db"
    kept: set[str] = set()
    for life in range(30):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, database, str(life)], stdout=subprocess.PIPE, text=True
        )
        with writer:
            assert writer.stdout is not None
            for _ in range(1 + 3 * life):
                kept.add(writer.stdout.readline().strip())
            os.kill(writer.pid, signal.SIGKILL)
            kept.update(line.strip() for line in writer.stdout if line.endswith("\n"))

    with AgentState(database) as state:
        found = set(ids(Outbox(state)))
        with state.transaction() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert kept <= found
    assert len(found) <= len(kept) + 30  # at most the one that each life had not reported yet


def test_two_programs_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    """Both found it empty; whoever comes second finds the tables of the first."""
    path = tmp_path / "state.db"
    with AgentState(path) as first:
        first.write("fact", Fact(7))
        with first.transaction() as connection:
            connection.execute("PRAGMA user_version = 0")  # as the second one read it
        with AgentState(path) as second:
            assert second.read("fact", Fact) == Fact(7)
