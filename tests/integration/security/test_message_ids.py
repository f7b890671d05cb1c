"""One device cannot have another's messages taken for copies."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from cloud_coordinator.database import Database
from cloud_coordinator.devices.enrolment import Enrolment
from cloud_coordinator.devices.service import DeviceService
from shared.messages import LeftRun, new_envelope
from tests.integration.coordinator.fake_device import DeviceKeys

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path}/shoal.db")
    opened.migrate()
    yield opened
    opened.close()


def test_a_device_that_overhears_an_id_cannot_use_it_up(database: Database) -> None:
    enrolment = Enrolment(database, coordinator_key_id="c" * 64, clock=lambda: NOW)
    token = enrolment.create_token(uses=2, lifetime=timedelta(hours=1))
    for name in ("thief", "victim"):
        enrolment.enrol(DeviceKeys().request(token, name))
    devices = DeviceService(database, clock=lambda: NOW)
    said = new_envelope(LeftRun(run_id="r", session_id="s", cause="c"), device="victim", now=NOW)
    copied = msgspec.structs.replace(said, device="thief")

    with database.transaction() as session:
        assert devices.first_time(session, copied)
    with database.transaction() as session:
        assert devices.first_time(session, said)
    with database.transaction() as session:
        assert not devices.first_time(session, said)
