"""Whoever holds the fleet key signs without believing the coordinator that asks for it."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from cloud_coordinator.devices.membership_signing import (
    Signing,
    Unsigned,
    read_unsigned,
    sign_unsigned,
)
from shared.errors import ConfigError, PeerError
from shared.membership import MemberEntry, MembershipList, next_list, open_list
from shared.signing import SigningKey

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = SigningKey.generate()
TRUSTED = {KEY.public.key_id: KEY.public}


def device(name: str, *, revoked: bool = False) -> MemberEntry:
    return MemberEntry(
        device_id=name,
        identity_key=str(SigningKey.generate().public),
        since=NOW - 300 * DAY,
        revoked_at=NOW if revoked else None,
    )


ONE, TWO, THREE = device("edge-1"), device("edge-2"), device("edge-3")


def exported(last: Signing | None, *devices: MemberEntry) -> Unsigned:
    """What an honest coordinator exports: the devices in the list that follows ``last``."""
    following = next_list(last.content if last else None, devices, fleet="main", now=NOW)
    assert following is not None
    return Unsigned(next=following, last=last.sealed if last else None)


def signed(
    unsigned: Unsigned, *, before: Signing | None = None, now: datetime = NOW + DAY
) -> Signing:
    return sign_unsigned(unsigned, KEY, signed_before=before.sealed if before else None, now=now)


FIRST = signed(exported(None, ONE))


def names(entries: tuple[MemberEntry, ...]) -> list[str]:
    return [entry.device_id for entry in entries]


def test_a_signed_list_is_the_exported_one_dated_when_it_was_signed() -> None:
    assert open_list(FIRST.sealed, TRUSTED, fleet="main") == FIRST.content
    assert FIRST.content.issued_at == NOW + DAY
    assert [entry.since for entry in FIRST.content.members] == [NOW + DAY]


def test_what_is_new_is_named() -> None:
    gone = msgspec.structs.replace(ONE, revoked_at=NOW)
    second = signed(exported(FIRST, gone, TWO, THREE))
    assert names(FIRST.added) == ["edge-1"]
    assert names(second.added) == ["edge-2", "edge-3"]
    assert names(second.revoked) == ["edge-1"]


def test_a_device_cannot_be_dated_back_by_the_coordinator() -> None:
    unsigned = exported(FIRST, TWO)
    early = tuple(
        msgspec.structs.replace(entry, since=FIRST.content.issued_at)
        for entry in unsigned.next.members
    )
    bad = Unsigned(next=msgspec.structs.replace(unsigned.next, members=early), last=unsigned.last)
    since = {e.device_id: e.since for e in signed(bad, now=NOW + 9 * DAY).content.members}
    assert since == {"edge-1": NOW + DAY, "edge-2": NOW + 9 * DAY}


def test_a_new_device_may_be_left_out_by_whoever_signs() -> None:
    unsigned = exported(FIRST, TWO, THREE)
    fewer = tuple(e for e in unsigned.next.members if e.device_id != "edge-2")
    kept = Unsigned(next=msgspec.structs.replace(unsigned.next, members=fewer), last=unsigned.last)
    assert names(signed(kept).content.members) == ["edge-1", "edge-3"]


def test_an_export_that_swaps_the_key_of_a_listed_device_is_refused() -> None:
    unsigned = exported(FIRST, TWO)
    members = (
        msgspec.structs.replace(unsigned.next.members[0], identity_key=THREE.identity_key),
        *unsigned.next.members[1:],
    )
    bad = Unsigned(next=msgspec.structs.replace(unsigned.next, members=members), last=FIRST.sealed)
    with pytest.raises(PeerError, match="gives edge-1 another key"):
        signed(bad)


def test_an_export_that_forgets_a_listed_device_is_refused() -> None:
    members = next_list(None, [TWO], fleet="main", now=NOW + 2 * DAY)
    assert members is not None
    later = msgspec.structs.replace(members, version=2)
    with pytest.raises(PeerError, match="has lost edge-1"):
        signed(Unsigned(next=later, last=FIRST.sealed))


def test_a_last_list_that_another_key_signed_is_refused() -> None:
    other = SigningKey.generate()
    forged = sign_unsigned(exported(None, ONE), other, signed_before=None, now=NOW)
    with pytest.raises(PeerError, match="signed by no key that is trusted here"):
        signed(exported(forged, TWO))


def test_a_coordinator_that_hides_the_list_signed_before_is_found_out() -> None:
    second = signed(exported(FIRST, TWO))
    with pytest.raises(ConfigError, match=r"list 2 was signed before .* does not know it"):
        signed(exported(FIRST, THREE), before=second)
    with pytest.raises(ConfigError, match="list 1 was signed before"):
        signed(exported(None, TWO), before=FIRST)


def test_two_pasts_of_one_version_are_found_out() -> None:
    fork = signed(exported(None, TWO))
    with pytest.raises(PeerError, match="two membership lists 1"):
        signed(exported(fork, THREE), before=FIRST)


def test_a_last_list_that_does_not_follow_the_one_signed_before_is_found_out() -> None:
    fork = signed(exported(signed(exported(None, TWO)), THREE))
    with pytest.raises(PeerError, match="has lost edge-1"):
        signed(exported(fork, device("edge-4")), before=FIRST)


def test_an_older_list_signed_before_is_no_hindrance() -> None:
    second = signed(exported(FIRST, TWO), before=FIRST)
    assert signed(exported(second, THREE), before=FIRST).content.version == 3


def test_there_must_be_something_to_sign() -> None:
    unchanged = msgspec.structs.replace(FIRST.content, version=2)
    with pytest.raises(ConfigError, match="nothing new to sign"):
        signed(Unsigned(next=unchanged, last=FIRST.sealed))


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 30_000, FIRST.sealed])
def test_something_else_than_an_export_is_refused_in_a_sentence(content: bytes) -> None:
    with pytest.raises(ConfigError, match="export it again") as caught:
        read_unsigned(content)
    assert "\n" not in str(caught.value)


def test_an_export_survives_its_file() -> None:
    unsigned = exported(FIRST, TWO)
    assert read_unsigned(msgspec.json.encode(unsigned)) == unsigned
    assert isinstance(unsigned.next, MembershipList)
