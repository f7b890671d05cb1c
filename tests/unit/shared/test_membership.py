"""The membership list only grows, and only the fleet key can make it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import membership
from shared.errors import ConfigError, PeerError
from shared.membership import (
    PAYLOAD_TYPE,
    MemberEntry,
    MembershipList,
    check_successor,
    members_of,
    next_list,
    open_list,
    sign_list,
)
from shared.signing import SigningKey, seal

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = timedelta(days=1)
FLEET_KEY = SigningKey.generate()
COMMAND_KEY = SigningKey.generate()
TRUSTED = {FLEET_KEY.public.key_id: FLEET_KEY.public}
NAMES = [f"edge-{i}" for i in range(6)]
KEYS = {name: str(SigningKey.generate().public) for name in NAMES}
OTHER_KEY = str(SigningKey.generate().public)


def entry(name: str, *, since: datetime = NOW, revoked: bool = False) -> MemberEntry:
    return MemberEntry(
        device_id=name,
        identity_key=KEYS[name],
        since=since,
        revoked_at=NOW + DAY if revoked else None,
    )


def a_list(*entries: MemberEntry, version: int = 1, issued_at: datetime = NOW) -> MembershipList:
    return MembershipList(fleet="main", version=version, issued_at=issued_at, members=entries)


def grown(
    steps: list[tuple[set[str], set[str]]], clock: Callable[[int], datetime]
) -> list[MembershipList]:
    """Make one list after another as a coordinator does, where something changed."""
    lists: list[MembershipList] = []
    joined: set[str] = set()
    revoked: set[str] = set()
    for i, (more, fewer) in enumerate(steps):
        joined |= more
        revoked |= fewer & joined
        devices = [entry(name, revoked=name in revoked) for name in joined]
        last = lists[-1] if lists else None
        following = next_list(last, devices, fleet="main", now=clock(i))
        if following is not None:
            lists.append(following)
    return lists


names = st.sets(st.sampled_from(NAMES))
steps = st.lists(st.tuples(names, names), min_size=1, max_size=6)
hours = st.lists(st.integers(-48, 48), min_size=6, max_size=6)


@given(steps=steps, hours=hours)
def test_each_list_follows_every_earlier_one_however_the_clock_goes(
    steps: list[tuple[set[str], set[str]]], hours: list[int]
) -> None:
    lists = grown(steps, lambda i: NOW + timedelta(hours=hours[i]))
    assert [item.version for item in lists] == list(range(1, len(lists) + 1))
    for i, later in enumerate(lists):
        for earlier in lists[:i]:
            check_successor(earlier, later)
            with pytest.raises(PeerError):
                check_successor(later, earlier)


@given(steps=steps)
def test_what_was_signed_is_what_is_opened(steps: list[tuple[set[str], set[str]]]) -> None:
    for content in grown(steps, lambda i: NOW + i * DAY):
        assert open_list(sign_list(content, FLEET_KEY), TRUSTED, fleet="main") == content


@given(steps=steps)
def test_the_members_are_the_listed_devices_that_were_not_revoked(
    steps: list[tuple[set[str], set[str]]],
) -> None:
    joined = set().union(*(more for more, _ in steps))
    last = grown(steps, lambda i: NOW + i * DAY)[-1]
    members = members_of(last)
    revoked = {e.device_id for e in last.members if e.revoked_at is not None}
    assert members.keys() | revoked == joined
    assert not members.keys() & revoked
    assert all(str(member.key) == KEYS[name] for name, member in members.items())


def test_nothing_new_makes_no_list() -> None:
    first = next_list(None, [entry("edge-0")], fleet="main", now=NOW)
    assert first is not None
    assert next_list(first, [entry("edge-0")], fleet="main", now=NOW + DAY) is None


def test_an_empty_fleet_has_a_first_list() -> None:
    assert next_list(None, [], fleet="main", now=NOW) == a_list()


def test_a_device_is_known_from_the_day_it_was_first_listed() -> None:
    first = next_list(None, [entry("edge-0", since=NOW - 9 * DAY)], fleet="main", now=NOW)
    assert first is not None
    devices = [entry("edge-0"), entry("edge-1", since=NOW - 9 * DAY)]
    second = next_list(first, devices, fleet="main", now=NOW + DAY)
    assert second is not None
    since = {name: member.known_since for name, member in members_of(second).items()}
    assert since == {"edge-0": NOW, "edge-1": NOW + DAY}


def test_a_device_that_is_listed_keeps_its_key_whatever_the_database_says_later() -> None:
    first = a_list(entry("edge-0"))
    swapped = msgspec.structs.replace(entry("edge-0"), identity_key=OTHER_KEY)
    assert next_list(first, [swapped], fleet="main", now=NOW + DAY) is None


OLD = a_list(entry("edge-0"), entry("edge-1", revoked=True), entry("edge-2"), version=3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda e: (e[0], e[2]), "list 4 has lost edge-1"),
        (lambda e: (_with(e[0], identity_key=OTHER_KEY), *e[1:]), "gives edge-0 another key"),
        (lambda e: (_with(e[0], since=NOW - DAY), *e[1:]), "changes since when it has edge-0"),
        (lambda e: (_with(e[0], since=NOW + DAY), *e[1:]), "changes since when it has edge-0"),
        (lambda e: (e[0], _with(e[1], revoked_at=None), e[2]), "takes the end of edge-1 back"),
        (lambda e: (e[0], _with(e[1], revoked_at=NOW), e[2]), "takes the end of edge-1 back"),
        (lambda e: (*e, entry("edge-3", since=NOW - DAY)), "edge-3 since before it was listed"),
    ],
    ids=["vanished", "key", "since earlier", "since later", "revived", "end moved", "backdated"],
)
def test_a_list_that_takes_something_back_is_refused(
    change: Callable[[tuple[MemberEntry, ...]], tuple[MemberEntry, ...]], sentence: str
) -> None:
    new = a_list(*change(OLD.members), version=4, issued_at=NOW + 2 * DAY)
    with pytest.raises(PeerError, match=sentence):
        check_successor(OLD, new)


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (msgspec.structs.replace(OLD, version=2), "list 2 is not newer than 3"),
        (OLD, "list 3 is not newer than 3"),
        (msgspec.structs.replace(OLD, version=4, fleet="other"), "of fleet 'other', not 'main'"),
        (a_list(version=4, issued_at=NOW - DAY), "list 4 is dated before list 3"),
    ],
    ids=["older", "same", "other fleet", "back-dated"],
)
def test_a_list_that_is_no_later_one_of_this_fleet_is_refused(
    new: MembershipList, sentence: str
) -> None:
    with pytest.raises(PeerError, match=sentence):
        check_successor(OLD, new)


def test_a_list_may_revoke_a_device_add_one_and_correct_an_owner() -> None:
    members = (
        _with(OLD.members[0], owner="Clinic A"),
        OLD.members[1],
        _with(OLD.members[2], revoked_at=NOW + DAY),
        entry("edge-3", since=NOW),
    )
    check_successor(OLD, a_list(*members, version=9, issued_at=NOW))


def _with(before: MemberEntry, **changes: object) -> MemberEntry:
    return msgspec.structs.replace(before, **changes)


def test_a_list_forged_with_the_command_key_is_refused() -> None:
    with pytest.raises(PeerError, match="signed by no key that is trusted here"):
        open_list(sign_list(OLD, COMMAND_KEY), TRUSTED, fleet="main")


def test_a_list_that_only_claims_the_fleet_key_is_refused() -> None:
    forged = msgspec.json.decode(sign_list(OLD, COMMAND_KEY))
    forged["signatures"][0]["keyid"] = FLEET_KEY.public.key_id
    with pytest.raises(PeerError, match="bad signature"):
        open_list(msgspec.json.encode(forged), TRUSTED, fleet="main")


def test_a_list_of_another_fleet_is_refused() -> None:
    with pytest.raises(PeerError, match="of fleet 'main', not 'other'"):
        open_list(sign_list(OLD, FLEET_KEY), TRUSTED, fleet="other")


def test_something_else_that_the_fleet_key_signed_is_no_list() -> None:
    sealed = seal(msgspec.json.encode(OLD), payload_type="application/x", key=FLEET_KEY)
    with pytest.raises(PeerError, match="envelope holds 'application/x'"):
        open_list(sealed, TRUSTED, fleet="main")


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_list_that_was_altered_anywhere_is_refused_or_says_the_same(place: int, bit: int) -> None:
    sealed = bytearray(sign_list(OLD, FLEET_KEY))
    sealed[place % len(sealed)] ^= 1 << bit
    try:
        opened = open_list(bytes(sealed), TRUSTED, fleet="main")
    except PeerError:
        return
    assert opened == OLD  # as where only the case of the name of a field was altered


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 0}, "version"),
        ({"issued_at": "2026-11-23T12:00:00"}, "timezone"),
        ({"members": [{"device_id": "edge-0"}]}, "identity_key"),
        ({"members": [OLD.members[1], OLD.members[0]]}, "not sorted"),
        ({"members": [OLD.members[0], OLD.members[0]]}, "not sorted"),
        (
            {"members": [entry("edge-0"), _with(entry("edge-1"), identity_key=KEYS["edge-0"])]},
            "two members have the same key",
        ),
        ({"members": [entry("edge-0", since=NOW + DAY)]}, "since later than the list"),
        ({"members": [_with(entry("edge-0"), device_id="../x")]}, "device_id"),
        ({"members": [_with(entry("edge-0"), identity_key="AAAA")]}, "identity_key"),
        ({"members": [_with(entry("edge-0"), owner="a\x1b[2J")]}, "owner"),
        ({"members": [_with(entry("edge-0"), owner="a" * 129)]}, "owner"),
    ],
)
def test_a_signed_list_that_breaks_the_schema_is_refused(
    change: dict[str, object], sentence: str
) -> None:
    content = msgspec.json.encode(msgspec.to_builtins(OLD) | change)
    sealed = seal(content, payload_type=PAYLOAD_TYPE, key=FLEET_KEY)
    with pytest.raises(PeerError, match=f"not a membership list: .*{sentence}"):
        open_list(sealed, TRUSTED, fleet="main")


def test_a_list_of_many_devices_is_refused_by_size_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sealed = sign_list(OLD, FLEET_KEY)
    monkeypatch.setattr(membership, "MAX_SEALED_BYTES", len(sealed) - 1)
    with pytest.raises(PeerError, match="is over"):
        open_list(sealed, TRUSTED, fleet="main")
    with pytest.raises(ConfigError, match="split the fleet in two"):
        sign_list(OLD, FLEET_KEY)
