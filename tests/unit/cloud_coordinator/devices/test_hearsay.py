"""What one message changes in what is known of a device, in whatever order messages arrive."""

from datetime import UTC, datetime, timedelta

import pytest

from cloud_coordinator.devices.service import take_in
from cloud_coordinator.devices.tables import DeviceRow
from shared.messages import (
    AnyBody,
    DeploymentState,
    Hello,
    Presence,
    PresenceState,
    Reported,
    Telemetry,
    new_envelope,
)

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture
def row() -> DeviceRow:
    return DeviceRow(device_id="a", presence="lost", telemetry_lost=0)


def hear(
    row: DeviceRow, body: AnyBody, *, sent: datetime = NOW, at: datetime | None = None
) -> None:
    take_in(row, new_envelope(body, device="a", now=sent), at or sent)


def presence(state: str, boot: str = "boot-1") -> Presence:
    return Presence(state=PresenceState(state), boot=boot)


def hello(boot: str = "boot-1", tasks: tuple[str, ...] = ("digits",)) -> Hello:
    return Hello(
        boot=boot,
        agent_version="1",
        protocol_min=1,
        protocol_max=1,
        cpu_count=2,
        memory_bytes=1,
        tasks=tasks,
    )


def telemetry(seq: int, boot: str = "boot-1") -> Telemetry:
    return Telemetry(boot=boot, seq=seq, cpu_percent=1.0, memory_bytes=1, disk_free_bytes=1)


def reported(desired_version: int, boot: str = "boot-1") -> Reported:
    return Reported(boot=boot, desired_version=desired_version, deployment=DeploymentState.SERVING)


def test_birth_and_goodbye_are_taken(row: DeviceRow) -> None:
    hear(row, presence("ready"))
    assert row.presence == "ready"
    hear(row, presence("stopped"))
    assert row.presence == "stopped"


def test_the_will_of_an_older_boot_is_ignored(row: DeviceRow) -> None:
    hear(row, presence("ready", "boot-1"))
    hear(row, presence("ready", "boot-2"), sent=NOW + SECOND)
    hear(row, presence("lost", "boot-1"), at=NOW + 2 * SECOND)
    assert row.presence == "ready"


def test_the_will_of_this_boot_counts(row: DeviceRow) -> None:
    hear(row, presence("ready"))
    hear(row, presence("lost"), sent=NOW - SECOND, at=NOW + SECOND)
    assert row.presence == "lost"


def test_a_birth_older_than_the_one_that_is_known_is_ignored(row: DeviceRow) -> None:
    hear(row, presence("ready", "boot-2"))
    hear(row, presence("ready", "boot-1"), sent=NOW - SECOND, at=NOW)
    assert row.boot == "boot-2"


def test_who_speaks_after_a_late_will_is_alive(row: DeviceRow) -> None:
    hear(row, presence("ready"))
    hear(row, presence("lost"))
    hear(row, telemetry(1), sent=NOW + SECOND)
    assert row.presence == "ready"


def test_a_message_that_waited_long_at_the_broker_proves_no_presence(row: DeviceRow) -> None:
    hear(row, presence("ready"))
    hear(row, presence("lost"))
    hear(row, hello(), sent=NOW, at=NOW + timedelta(minutes=3))
    assert row.presence == "lost"


def test_a_hello_that_overtook_its_birth_is_taken(row: DeviceRow) -> None:
    hear(row, presence("ready", "boot-1"))
    hear(row, hello("boot-2", ("weather",)), sent=NOW + SECOND)
    assert row.hello is not None
    assert row.hello["tasks"] == ("weather",)
    assert row.boot == "boot-2"


def test_a_hello_of_an_older_boot_is_ignored(row: DeviceRow) -> None:
    hear(row, presence("ready", "boot-2"))
    hear(row, hello("boot-1"), sent=NOW - SECOND, at=NOW)
    assert row.hello is None


def test_gaps_in_telemetry_are_counted_within_a_boot(row: DeviceRow) -> None:
    hear(row, presence("ready"))
    for seq in (1, 2, 5, 6):
        hear(row, telemetry(seq), sent=NOW + seq * SECOND)
    assert row.telemetry_lost == 2
    hear(row, telemetry(1, "boot-2"), sent=NOW + 10 * SECOND)
    assert row.telemetry_lost == 2


def test_an_older_report_does_not_replace_a_newer_one(row: DeviceRow) -> None:
    hear(row, presence("ready"))
    hear(row, reported(2), sent=NOW + 2 * SECOND)
    hear(row, reported(1), sent=NOW + SECOND, at=NOW + 3 * SECOND)
    assert row.reported is not None
    assert row.reported["desired_version"] == 2


def test_a_device_whose_clock_ran_ahead_is_heard_once_it_is_mended(row: DeviceRow) -> None:
    hear(row, presence("ready", "boot-1"), sent=NOW + timedelta(days=1), at=NOW)
    hear(row, presence("ready", "boot-2"), sent=NOW + SECOND)
    assert row.boot == "boot-2"
