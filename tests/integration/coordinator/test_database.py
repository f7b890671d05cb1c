"""What the coordinator relies on in its database, on SQLite and on PostgreSQL."""

import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text, update

from cloud_coordinator.database import Database, change_one
from cloud_coordinator.devices.tables import JoinTokenRow
from cloud_coordinator.migrations.tables import METADATA
from shared.errors import ConfigError, ConflictError, UnavailableError
from shared.listening import free_port

NOW = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC)


def token(*, at: datetime = NOW) -> JoinTokenRow:
    return JoinTokenRow(
        token_id="t1", secret_hash="0" * 64, uses_left=1, created_at=at, expires_at=at
    )


def test_migrations_and_tables_agree(database: Database) -> None:
    with database.connection() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_migrating_twice_changes_nothing(database: Database) -> None:
    with database.transaction() as session:
        session.add(token())
    database.migrate()
    with database.transaction() as session:
        assert session.get(JoinTokenRow, "t1") is not None


def test_times_come_back_aware_in_utc(database: Database) -> None:
    there = timezone(timedelta(hours=5, minutes=30))
    with database.transaction() as session:
        session.add(token(at=NOW.astimezone(there)))
    with database.transaction() as session:
        row = session.get(JoinTokenRow, "t1")
        assert row is not None
        assert row.created_at == NOW
        assert row.created_at.tzinfo is UTC


def test_a_naive_time_is_refused(database: Database) -> None:
    with pytest.raises(Exception, match="has no time zone"), database.transaction() as session:
        session.add(token(at=NOW.replace(tzinfo=None)))


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    def fail_half_way() -> None:
        with database.transaction() as session:
            session.add(token())
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with database.transaction() as session:
        assert session.get(JoinTokenRow, "t1") is None


def test_a_change_that_came_second_is_a_conflict(database: Database) -> None:
    with database.transaction() as session:
        session.add(token())
    spend = (
        update(JoinTokenRow)
        .where(JoinTokenRow.token_id == "t1", JoinTokenRow.uses_left == 1)
        .values(uses_left=0)
    )
    with database.transaction() as session:
        change_one(session, spend, what="the token")
    with (
        pytest.raises(ConflictError, match="changed by somebody else"),
        database.transaction() as s,
    ):
        change_one(s, spend, what="the token")


def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'shoal.db'}")
    database.migrate()
    with database.transaction() as session:
        session.execute(text("PRAGMA max_page_count = 1"))  # no page more than there are

    def fill() -> None:
        with database.transaction() as session:
            session.add(token())
            session.execute(text("CREATE TABLE big AS SELECT randomblob(1000000)"))

    with pytest.raises(UnavailableError, match="disk is full") as caught:
        fill()
    assert "\n" not in str(caught.value)
    with database.transaction() as session:
        assert session.get(JoinTokenRow, "t1") is None
    database.close()


def test_writers_wait_for_each_other(database: Database) -> None:
    with database.transaction() as session:
        session.add(token())

    def add_a_use() -> None:
        for _ in range(20):
            with database.transaction() as session:
                row = session.get(JoinTokenRow, "t1", with_for_update=True)
                assert row is not None
                row.uses_left += 1

    threads = [threading.Thread(target=add_a_use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with database.transaction() as session:
        row = session.get(JoinTokenRow, "t1")
        assert row is not None
        assert row.uses_left == 81


def test_a_database_that_is_away_is_named_without_its_password() -> None:
    database = Database(f"postgresql://shoal:sesame@127.0.0.1:{free_port()}/shoal")
    with pytest.raises(UnavailableError, match="start it or mend --database") as caught:
        database.migrate()
    assert "sesame" not in str(caught.value)


def test_a_database_file_in_no_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="mend --database"):
        Database(f"sqlite:///{tmp_path}/nowhere/shoal.db").migrate()


@pytest.mark.parametrize("url", ["shoal.db", "oracle-of-delphi://x/y", "mqtt://x"])
def test_something_else_than_a_database_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no database URL"):
        Database(url)


def test_closing_waits_for_a_transaction_that_somebody_was_cancelled_in(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'shoal.db'}")
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with database.transaction():
            begun.set()
            go_on.wait(30)
            order.append("worked")

    def close() -> None:
        database.close()
        order.append("closed")

    threads = [threading.Thread(target=work)]
    threads[0].start()
    begun.wait(30)
    threads.append(threading.Thread(target=close))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert order == ["worked", "closed"]
