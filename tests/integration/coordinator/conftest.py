"""Databases of both kinds for the coordinator's tests; PostgreSQL as a cluster of our own."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cloud_coordinator.database import Database
from shared.child import die_with_parent
from shared.listening import free_port
from tests.system_packages import require_program

TIME_LIMIT_S = 60.0


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Start a throw-away cluster; skip, or fail under CI, where PostgreSQL is missing."""
    programs = require_program("initdb", package="postgresql").resolve().parent
    user = _unprivileged_user()
    folder = Path(tempfile.mkdtemp(prefix="shoal-pg-"))
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    try:
        _run([programs / "initdb", "-D", folder / "data", "-U", "shoal", "-A", "trust"], user)
        port = free_port()
        options = ("-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off")
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-k", folder, *options],
            user=user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509  # one system call, in a fresh child
        )
        try:
            url = f"postgresql://shoal@127.0.0.1:{port}"
            _wait_until_up(url)
            yield url
        finally:
            server.terminate()
            server.wait(TIME_LIMIT_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shoal.db'}"
    server: str = request.getfixturevalue("postgres_url")
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}/{name}"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database of each kind."""
    opened = Database(database_url)
    opened.migrate()
    yield opened
    opened.close()


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _run(argv: list[str | Path], user: str | None) -> None:
    subprocess.run(argv, user=user, cwd="/", check=True, capture_output=True, timeout=TIME_LIMIT_S)


def _wait_until_up(url: str) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while True:
        try:
            with psycopg.connect(f"{url}/postgres", connect_timeout=5):
                return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
