"""The coordinator's membership list, on SQLite and on PostgreSQL, and its offline key by hand."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select

from cloud_coordinator.database import Database
from cloud_coordinator.devices.enrolment import Enrolment
from cloud_coordinator.devices.membership import Membership
from cloud_coordinator.devices.membership_signing import sign_unsigned
from cloud_coordinator.devices.tables import DeviceRow, MembershipListRow
from cloud_coordinator.keys import FleetKey
from edge_agent.enrolment import enroll
from edge_agent.membership import members_for
from shared.errors import (
    ConfigError,
    ConflictError,
    NotFoundError,
    PeerError,
    UnavailableError,
)
from shared.membership import MembershipList, open_list, sign_list
from shared.signing import SigningKey
from tests.integration.coordinator.fake_device import DeviceKeys
from tests.integration.coordinator.live import live
from tests.integration.coordinator.served import Served, shoal

HOUR = timedelta(hours=1)
KEY = SigningKey.generate()
BESIDE = FleetKey(KEY.public, KEY)
OFFLINE = FleetKey(KEY.public, None)
TRUSTED = {KEY.public.key_id: KEY.public}


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 23, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Fleet:
    """A database with devices, and the services that work on it."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database, self.clock = database, clock
        self.enrolment = Enrolment(database, coordinator_key_id="c" * 64, clock=clock)

    def enrol(self, *names: str, owner: str = "") -> None:
        token = self.enrolment.create_token(uses=len(names), lifetime=HOUR, owner=owner)
        for name in names:
            self.enrolment.enrol(DeviceKeys().request(token, name))

    def fill(self, count: int) -> None:
        """Add devices by the hundred; the keys are random bytes, nobody has their other half."""
        token = self.enrolment.create_token(uses=1, lifetime=HOUR)
        with self.database.transaction() as session:
            known = session.scalar(select(func.count(DeviceRow.device_id))) or 0
            for i in range(known, known + count):
                row = DeviceRow(
                    device_id=f"device-{i:06d}",
                    identity_key=str(SigningKey.generate().public),
                    node_key_pem=f"pem {i}",
                    token_id=token.token_id,
                    enrolled_at=self.clock(),
                )
                session.add(row)

    def rows(self) -> list[DeviceRow]:
        with self.database.transaction() as session:
            return list(session.scalars(select(DeviceRow).order_by(DeviceRow.device_id)))

    def kept(self) -> list[int]:
        with self.database.transaction() as session:
            return list(session.scalars(select(MembershipListRow.version)))

    def membership(self, key: FleetKey = BESIDE, *, fleet: str = "main") -> Membership:
        return Membership(self.database, fleet=fleet, key=key, clock=self.clock)


@pytest.fixture
def fleet(database: Database, clock: Clock) -> Fleet:
    return Fleet(database, clock)


def opened(membership: Membership) -> MembershipList:
    return open_list(membership.sealed(), TRUSTED, fleet="main")


def sign(membership: Membership, *, now: datetime, before: bytes | None = None) -> bytes:
    return sign_unsigned(membership.unsigned(), KEY, signed_before=before, now=now).sealed


def test_every_enrolled_device_is_listed_when_a_sum_needs_the_list(fleet: Fleet) -> None:
    fleet.enrol("a", owner="Clinic A")
    fleet.enrol("b")
    membership = fleet.membership()
    version, members = membership.current()
    assert version == 1
    assert {name: (m.owner, m.known_since) for name, m in members.items()} == {
        "a": ("Clinic A", fleet.clock()),
        "b": ("", fleet.clock()),
    }
    assert {row.device_id: row.identity_key for row in fleet.rows()} == {
        name: str(member.key) for name, member in members.items()
    }
    assert opened(membership).version == 1


def test_a_list_is_signed_only_when_devices_changed(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership()
    first = membership.current()
    sealed = membership.sealed()
    fleet.clock.now += HOUR
    assert membership.current() == first
    assert membership.sealed() is sealed
    fleet.enrol("b")
    version, members = membership.current()
    assert (version, sorted(members)) == (2, ["a", "b"])
    assert members["a"].known_since < members["b"].known_since
    assert fleet.kept() == [2]


def test_a_thousand_enrolments_sign_few_lists(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[int] = []

    def counting(content: MembershipList, key: SigningKey) -> bytes:
        signed.append(content.version)
        return sign_list(content, key)

    monkeypatch.setattr("cloud_coordinator.devices.membership.sign_list", counting)
    membership = fleet.membership()
    for _ in range(2):  # two rounds, with five hundred enrolments before each
        for _ in range(5):
            fleet.fill(100)
            assert len(membership.listed(fleet.rows())) == len(fleet.rows())
            assert membership.status().waiting
        membership.current()
        membership.current()
    assert signed == [1, 2]
    assert len(membership.current()[1]) == 1000


def test_a_coordinator_that_starts_again_goes_on_with_its_versions(fleet: Fleet) -> None:
    fleet.enrol("a")
    fleet.membership().current()
    fleet.enrol("b")
    before = fleet.membership()
    version, members = before.current()
    after = fleet.membership()
    assert after.sealed() == before.sealed()
    assert (after.current()[0], after.current()[1].keys()) == (version, members.keys())
    fleet.enrol("c")
    assert after.current()[0] == version + 1 == 3


def test_an_empty_fleet_has_a_list_too(fleet: Fleet) -> None:
    assert fleet.membership().current() == (1, {})


def test_a_clock_that_went_back_does_not_stop_the_list(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership()
    membership.current()
    issued_at = fleet.clock.now
    fleet.clock.now -= HOUR
    fleet.enrol("b")
    assert membership.current()[0] == 2
    assert opened(membership).issued_at == issued_at


def test_a_revoked_device_is_in_no_later_list_of_members(fleet: Fleet) -> None:
    fleet.enrol("a", "b")
    membership = fleet.membership()
    membership.current()
    membership.revoke("a")
    assert membership.status().waiting == ("a",)
    assert membership.listed(fleet.rows()) == {"b"}
    version, members = membership.current()
    assert (version, sorted(members)) == (2, ["b"])
    [entry, _] = opened(membership).members
    fleet.clock.now += HOUR
    membership.revoke("a")  # once more changes nothing
    assert membership.current()[0] == 2
    assert opened(membership).members[0].revoked_at == entry.revoked_at is not None
    with pytest.raises(NotFoundError, match="there is no device 'nobody'"):
        membership.revoke("nobody")


def test_the_first_of_several_askers_signs_for_all(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: membership.current()[0], range(8)))
    assert found == [1] * 8


def test_two_coordinators_on_one_database_never_keep_one_version_twice(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.enrol("a")
    first, second = fleet.membership(), fleet.membership()
    first.current()
    second.current()
    fleet.enrol("b")

    def too_late(content: MembershipList, key: SigningKey) -> bytes:
        monkeypatch.undo()
        first.current()
        return sign_list(content, key)

    monkeypatch.setattr("cloud_coordinator.devices.membership.sign_list", too_late)
    with pytest.raises(ConflictError, match="changed by somebody else; try again"):
        second.current()
    assert second.sealed() == first.sealed()
    assert second.current()[0] == 2


def test_a_list_of_another_fleet_key_is_not_gone_on_with(fleet: Fleet) -> None:
    fleet.membership().current()
    other = SigningKey.generate()
    with pytest.raises(ConfigError, match="put the fleet key back"):
        fleet.membership(FleetKey(other.public, other)).current()


def test_with_the_key_offline_devices_wait_until_somebody_signs(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership(OFFLINE)
    for ask in (membership.current, membership.sealed):
        with pytest.raises(UnavailableError, match="nobody has signed a membership list yet"):
            ask()
    assert membership.listed(fleet.rows()) == frozenset()
    assert membership.status().waiting == ("a",)

    first = sign(membership, now=fleet.clock() + HOUR)
    assert membership.take(first).version == 1
    assert membership.sealed() == first
    assert membership.listed(fleet.rows()) == {"a"}
    with pytest.raises(ConflictError, match="the signed one names every device"):
        membership.unsigned()

    fleet.enrol("b")
    assert membership.current()[1].keys() == {"a"}
    assert membership.listed(fleet.rows()) == {"a"}
    assert membership.status().waiting == ("b",)
    membership.take(sign(membership, now=fleet.clock() + 2 * HOUR, before=first))
    assert membership.current()[1].keys() == {"a", "b"}
    assert membership.status().waiting == ()


def test_the_same_signed_list_may_be_imported_again(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership(OFFLINE)
    first = sign(membership, now=fleet.clock())
    membership.take(first)
    membership.take(first)
    assert fleet.kept() == [1]


def test_a_list_that_the_fleet_key_did_not_sign_is_not_taken(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership(OFFLINE)
    forged = sign_list(membership.unsigned().next, SigningKey.generate())
    with pytest.raises(PeerError, match="signed by no key that is trusted here"):
        membership.take(forged)
    assert fleet.kept() == []


def test_a_list_that_takes_something_back_is_not_taken(fleet: Fleet) -> None:
    fleet.enrol("a", "b")
    membership = fleet.membership(OFFLINE)
    first = sign(membership, now=fleet.clock())
    membership.take(first)
    content = opened(membership)
    fewer = msgspec.structs.replace(content, version=2, members=content.members[1:])
    with pytest.raises(PeerError, match="list 2 has lost a"):
        membership.take(sign_list(fewer, KEY))
    older = msgspec.structs.replace(content, issued_at=fleet.clock() + HOUR)
    with pytest.raises(PeerError, match="list 1 is not newer than 1"):
        membership.take(sign_list(older, KEY))
    assert membership.sealed() == first


def test_a_list_with_another_key_for_a_device_of_ours_is_not_taken(fleet: Fleet) -> None:
    fleet.enrol("a")
    membership = fleet.membership(OFFLINE)
    content = membership.unsigned().next
    [entry] = content.members
    other = msgspec.structs.replace(entry, identity_key=str(SigningKey.generate().public))
    sealed = sign_list(msgspec.structs.replace(content, members=(other,)), KEY)
    with pytest.raises(PeerError, match="another key than the one it enrolled with"):
        membership.take(sealed)


def test_a_key_can_be_taken_offline_later(fleet: Fleet) -> None:
    fleet.enrol("a")
    fleet.membership().current()
    fleet.enrol("b")
    offline = fleet.membership(OFFLINE)
    assert offline.current()[0] == 1
    assert offline.status().waiting == ("b",)
    offline.take(sign(offline, now=fleet.clock() + HOUR))
    assert offline.current()[0] == 2


# --- over the API, and by hand ------------------------------------------------------------------


async def test_a_device_fetches_the_list_by_its_signature_and_nobody_else_may(
    tmp_path: Path,
) -> None:
    async with live(tmp_path) as service:
        await service.enrol("a")
        answer = await service.client.get("/v1/membership")
        assert answer.status_code == 503
        await asyncio.to_thread(service.coordinator.membership.current)
        answer = await service.client.get("/v1/membership")
        assert answer.content == service.coordinator.membership.sealed()
        stranger = await service.client.get("/v1/membership", headers={"Authorization": ""})
        assert stranger.status_code == 401


async def test_the_api_says_where_the_fleet_key_is_and_whose_a_device_is(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        body = {"uses": 1, "owner": "Clinic A"}
        await service.client.post("/v1/tokens", json=body)
        [token] = await service.get("/v1/tokens")
        assert token["owner"] == "Clinic A"
        await service.enrol("a")
        device = await service.get("/v1/devices/a")
        assert (device["owner"], device["listed"], device["revoked_at"]) == ("", True, None)
        answer = await service.client.post("/v1/membership/revoked/a")
        assert answer.json()["waiting"] == ["a"]
        [device] = await service.get("/v1/devices")
        assert not device["listed"]
        assert device["revoked_at"] is not None
        status = await service.get("/v1/membership/status")
    assert status["fleet_key"] == "beside"
    assert status["fleet_key_id"] == service.coordinator.keys.fleet.public.key_id


async def test_an_owner_is_no_place_for_control_characters(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        for owner in ("a\x00b", "a\nb", "a\x1b[2J", "a" * 129):
            answer = await service.client.post("/v1/tokens", json={"owner": owner})
            assert answer.status_code == 400, owner
            assert "body.owner" in answer.json()["error"]


async def said(*argv: str | Path) -> str:
    """Run a command that must succeed."""
    status, out, err = await shoal(*argv)
    assert (status, err) == (0, ""), argv
    return out


@pytest.fixture
async def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A coordinator whose fleet key is elsewhere, in ``key/``."""
    monkeypatch.setenv("SHOAL_FLEET_KEY", "offline")
    service = Served(tmp_path)
    await said("membership", "new-key", tmp_path / "key" / "fleet.pem")
    service.home.mkdir(mode=0o700)
    public = (tmp_path / "key" / "fleet.pub").read_bytes()
    (service.home / "fleet-key.pub").write_bytes(public)
    await service.start()
    yield service
    if service.process.returncode is None:
        await service.end(signal.SIGTERM)


async def join(service: Served, folder: Path, name: str, **given: Any) -> Any:
    token = await said("token", "create", "--owner", "Clinic A", "--home", service.home)
    home = folder / name
    return home, await asyncio.to_thread(enroll, home, service.url, token, name, **given)


async def test_an_offline_list_is_exported_signed_elsewhere_and_imported(
    offline: Served, tmp_path: Path
) -> None:
    key, to_sign, out = tmp_path / "key" / "fleet.pem", tmp_path / "next.json", tmp_path / "m.json"
    home = ("--home", offline.home)
    sign_it = ("membership", "sign", to_sign, "--key", key, "--out", out)
    shown = json.loads(await said("membership", "show", "--json", *home))
    assert (shown["fleet_key"], shown["version"]) == ("offline", 0)
    fingerprint = shown["fleet_key_id"]
    site, enrolled = await join(offline, tmp_path, "camera-1", fleet_key_id=fingerprint)
    assert list(enrolled.fleet_keys) == [fingerprint]
    assert "waits for the membership list" in await said("device", "show", "camera-1", *home)
    assert "1 (camera-1), until the list is signed" in await said("membership", "show", *home)

    assert "wrote list 1 with 1 devices" in await said("membership", "export", to_sign, *home)
    assert "timestamp" in await said("trust", "status", *home)
    table = await said(*sign_it)
    assert "camera-1" in table
    assert "Clinic A" in table
    assert "signed list 1 of fleet main" in table
    assert "list 1 with 1 members is in force" in await said("membership", "import", out, *home)
    members = await asyncio.to_thread(members_for, site, enrolled, 1)
    assert members["camera-1"].owner == "Clinic A"

    await join(offline, tmp_path, "camera-2")
    assert "waits for the membership list" in await said("device", "list", *home)
    await said("membership", "export", to_sign, *home)
    await said(*sign_it)
    await offline.end(signal.SIGTERM)
    await offline.start()
    assert "list 2 with 2 members" in await said("membership", "import", out, *home)
    members = await asyncio.to_thread(members_for, site, enrolled, 2)
    assert members.keys() == {"camera-1", "camera-2"}
    assert "waits" not in await said("device", "list", *home)

    assert "in no sum any more" in await said("membership", "revoke", "camera-2", *home)
    await said("membership", "export", to_sign, *home)
    assert "revoked" in await said(*sign_it)
    await said("membership", "import", out, *home)
    members = await asyncio.to_thread(members_for, site, enrolled, 3)
    assert members.keys() == {"camera-1"}


async def test_a_coordinator_with_every_key_but_the_fleet_key_cannot_add_a_device(
    offline: Served, tmp_path: Path
) -> None:
    key, to_sign, out = tmp_path / "key" / "fleet.pem", tmp_path / "next.json", tmp_path / "m.json"
    home = ("--home", offline.home)
    site, enrolled = await join(offline, tmp_path, "camera-1")
    await said("membership", "export", to_sign, *home)
    await said("membership", "sign", to_sign, "--key", key, "--out", out)
    await said("membership", "import", out, *home)
    await asyncio.to_thread(members_for, site, enrolled, 1)

    await join(offline, tmp_path, "sybil-1")
    await said("membership", "export", to_sign, *home)
    await offline.end(signal.SIGTERM)
    database = Database(f"sqlite:///{offline.home / 'shoal.db'}")
    unsigned = json.loads(to_sign.read_bytes())["next"]
    content = msgspec.convert(unsigned, MembershipList)
    for name in ("command-key.pem", "model-key.pem"):
        forged = sign_list(content, SigningKey.load_or_create(offline.home / name))
        with database.transaction() as session:
            row = session.get_one(MembershipListRow, 1)
            row.sealed = forged
        database.close()
        with pytest.raises(ConfigError, match="signed by no key that is trusted here"):
            Membership(
                database,
                fleet="main",
                key=FleetKey(next(iter(enrolled.fleet_keys.values())), None),
                clock=Clock(),
            ).current()
        with pytest.raises(PeerError, match="signed by no key that is trusted here"):
            open_list(forged, enrolled.fleet_keys, fleet="main")
    members = await asyncio.to_thread(members_for, site, enrolled, 1)
    assert members.keys() == {"camera-1"}


async def test_commands_for_the_list_say_what_is_wrong_in_one_sentence(
    offline: Served, tmp_path: Path
) -> None:
    key, file = tmp_path / "key" / "fleet.pem", tmp_path / "next.json"
    home = ("--home", offline.home)
    await join(offline, tmp_path, "camera-1")
    await said("membership", "export", file, *home)
    await said("membership", "sign", file, "--key", key, "--out", tmp_path / "m.json")
    (tmp_path / "text").write_text("hello")
    out = ("--out", tmp_path / "x.json")
    again = ("--key", key, "--out", tmp_path / "m.json")
    sentences: dict[tuple[str | Path, ...], str] = {
        ("new-key", key): "a lost fleet key cannot be replaced",
        ("sign", file, "--key", tmp_path / "none.pem", *out): "is not a fleet key",
        ("sign", file, "--key", tmp_path / "text", *out): "is not a fleet key",
        ("sign", tmp_path / "text", "--key", key, *out): "export it again",
        ("sign", tmp_path / "none", "--key", key, *out): "cannot read",
        ("sign", file, *again): "list 1 was signed before",
        ("import", tmp_path / "text", *home): "is no signed membership list",
        ("import", file, *home): "not a signed envelope",
        ("revoke", "nobody", *home): "there is no device 'nobody'",
    }
    for argv, sentence in sentences.items():
        status, said_out, err = await shoal("membership", *argv)
        assert (status, said_out) == (1, ""), argv
        assert sentence in err
        assert err.count("\n") == 1
    await said("membership", "import", tmp_path / "m.json", *home)
    status, _, err = await shoal("membership", "export", file, *home)
    assert (status, "nothing waits" in err) == (1, True)


async def test_a_key_beside_the_coordinator_is_said_to_protect_against_no_one_who_owns_it(
    tmp_path: Path,
) -> None:
    service = Served(tmp_path)
    await service.start()
    try:
        shown = await said("membership", "show", "--home", service.home)
    finally:
        await service.end(signal.SIGTERM)
    for text in (shown, service.log.read_text()):
        assert "the fleet key lies beside the coordinator" in text
        assert "protects against no one who owns the coordinator" in text
