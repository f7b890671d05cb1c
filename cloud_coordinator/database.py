"""The database: the truth that survives every crash; SQLite by default, PostgreSQL by URL.

Calls block, so the asyncio shell runs them in threads. A transaction on SQLite takes the write lock
when it begins (BEGIN IMMEDIATE): one that reads first and writes later could otherwise fail half
way, however long it was willing to wait.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    DateTime,
    Dialect,
    Engine,
    MetaData,
    TypeDecorator,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.engine import Connection, CursorResult
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.sql.dml import Update

from shared.errors import ConfigError, ConflictError, UnavailableError

BUSY_TIMEOUT_S = 30.0
_CLOSE_DEADLINE_S = 10.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on every database; SQLite itself would drop the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times; hand SQLite the UTC wall clock."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Parent of all rows. Constraints have names, so that migrations can speak of them."""

    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {datetime: UtcDateTime}  # noqa: RUF012  # SQLAlchemy's own spelling


class Database:
    """One database by URL: ``sqlite:///…`` or ``postgresql://…``."""

    def __init__(self, url: str) -> None:
        self._engine = _create_engine(url)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        self._free = threading.Condition()
        self._users = 0  # transactions that are open now

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a session whose work is committed at the end, or undone by an exception.

        Raises:
            UnavailableError: the database is away, its disk is full, or others hold it too long.
        """
        try:
            with self._in_use(), self._sessions.begin() as session:
                yield session
        except OperationalError as error:
            raise UnavailableError(
                f"the database cannot be used now ({_first_line(error)}); "
                "look at its disk and at its server, nothing was changed"
            ) from error

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Open a bare connection, for what looks at the schema itself."""
        with self._engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the schema to this version's.

        Raises:
            UnavailableError: the database cannot be reached.
        """
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with self.connection() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except OperationalError as error:
            self.close()
            where = self._engine.url.render_as_string(hide_password=True)
            raise UnavailableError(
                f"the database {where} cannot be used ({_first_line(error)}); "
                "start it or mend --database"
            ) from error

    def close(self) -> None:
        """Close all connections; whoever was cancelled may have left a thread at work in one."""
        with self._free:
            self._free.wait_for(lambda: self._users == 0, _CLOSE_DEADLINE_S)
        self._engine.dispose()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._free:
            self._users += 1
        try:
            yield
        finally:
            with self._free:
                self._users -= 1
                self._free.notify_all()


def change_one(session: Session, change: Update, *, what: str) -> None:
    """Carry out a compare-and-set: an UPDATE whose WHERE names the state that was read.

    Raises:
        ConflictError: no row was changed, so somebody else moved it since.
    """
    result = cast("CursorResult[Any]", session.execute(change))
    if result.rowcount != 1:
        raise ConflictError(f"{what} was changed by somebody else meanwhile; look at it again")


def _create_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"{url.rsplit('@', maxsplit=1)[-1]!r} is no database URL; "
            "write sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions by rules of its own
    for pragma in (
        f"busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}",
        "journal_mode = WAL",
        "synchronous = FULL",  # what was acknowledged survives a power cut
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _first_line(error: OperationalError) -> str:
    return str(error.orig).strip().split("\n", maxsplit=1)[0]
