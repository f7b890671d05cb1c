"""The list that a device keeps, over real HTTP, from a coordinator that can misbehave."""

import dataclasses
import http.server
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue

import msgspec
import pytest

from edge_agent import membership
from edge_agent.enrolment import Enrolment
from edge_agent.membership import LIST_FILE, members_for
from shared.errors import PeerError, UnavailableError
from shared.listening import free_port
from shared.membership import MemberEntry, MembershipList, next_list, sign_list
from shared.request_signing import verify_request
from shared.signing import SigningKey

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
FLEET_KEY = SigningKey.generate()
COMMAND_KEY = SigningKey.generate()
IDENTITY = SigningKey.generate()
PATIENCE_S = 20.0


def device(name: str) -> MemberEntry:
    return MemberEntry(device_id=name, identity_key=str(SigningKey.generate().public), since=NOW)


ONE, TWO, THREE = device("edge-1"), device("edge-2"), device("edge-3")


def after(last: MembershipList | None, *devices: MemberEntry) -> MembershipList:
    now = NOW if last is None else last.issued_at + timedelta(hours=1)
    following = next_list(last, devices, fleet="main", now=now)
    assert following is not None
    return following


FIRST = after(None, ONE)
SECOND = after(FIRST, TWO)
THIRD = after(SECOND, THREE)
FORK = after(after(None, THREE), TWO)


class SmallCoordinator:
    """Serves one list; tests change which, and how."""

    def __init__(self) -> None:
        self.sealed = sign_list(FIRST, FLEET_KEY)
        self.statuses: SimpleQueue[int] = SimpleQueue()  # of the answers to come; then 200
        self.requests: list[dict[str, str]] = []
        self.pause_s = 0.0

    def serve(self, content: MembershipList, key: SigningKey = FLEET_KEY) -> None:
        self.sealed = sign_list(content, key)


@pytest.fixture
def coordinator() -> SmallCoordinator:
    return SmallCoordinator()


@pytest.fixture
def enrolment(coordinator: SmallCoordinator) -> Iterator[Enrolment]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            coordinator.requests.append({k.lower(): v for k, v in self.headers.items()})
            found = self.path == "/v1/membership"
            status = 200 if found else 404
            if not coordinator.statuses.empty():
                status = coordinator.statuses.get()
            content = coordinator.sealed if status == 200 else b""
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            try:
                for i in range(0, len(content), 100):
                    self.wfile.write(content[i : i + 100])
                    time.sleep(coordinator.pause_s)
            except OSError:
                pass  # who asked has gone

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield enrolment_at(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


def enrolment_at(url: str) -> Enrolment:
    return Enrolment(
        device_id="edge-1",
        fleet="main",
        api_url=url,
        mqtt_url="mqtt://127.0.0.1:1",
        superlink_ca_pem="",
        node_key_path=Path("node.pem"),
        key=IDENTITY,
        command_keys={COMMAND_KEY.public.key_id: COMMAND_KEY.public},
        model_keys={},
        fleet_keys={FLEET_KEY.public.key_id: FLEET_KEY.public},
    )


def test_a_first_list_is_fetched_kept_and_not_fetched_again(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    members = members_for(tmp_path, enrolment, 1)
    assert {name: str(m.key) for name, m in members.items()} == {"edge-1": ONE.identity_key}
    assert members_for(tmp_path, enrolment, 1) is members
    assert len(coordinator.requests) == 1
    path = tmp_path / LIST_FILE
    assert path.read_bytes() == coordinator.sealed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_request_is_signed_by_the_device(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    members_for(tmp_path, enrolment, 1, now=lambda: NOW)
    verify_request(
        method="GET",
        path="/v1/membership",
        body=b"",
        headers=coordinator.requests[0],
        key=IDENTITY.public,
        now=NOW,
    )


def test_a_newer_list_is_fetched_when_a_sum_names_it(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    members_for(tmp_path, enrolment, 1)
    coordinator.serve(THIRD)
    assert members_for(tmp_path, enrolment, 1).keys() == {"edge-1"}
    assert members_for(tmp_path, enrolment, 2).keys() == {"edge-1", "edge-2", "edge-3"}
    assert (tmp_path / LIST_FILE).read_bytes() == coordinator.sealed


def test_a_sum_over_an_older_list_is_judged_by_the_newest_one(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    gone = msgspec.structs.replace(ONE, revoked_at=NOW)
    coordinator.serve(after(SECOND, gone))
    members_for(tmp_path, enrolment, 3)
    assert members_for(tmp_path, enrolment, 1).keys() == {"edge-2"}


def serve_forged(coordinator: SmallCoordinator) -> None:
    coordinator.serve(THIRD, COMMAND_KEY)


def serve_fork(coordinator: SmallCoordinator) -> None:
    coordinator.serve(after(FORK, device("edge-9")))


def serve_other_key(coordinator: SmallCoordinator) -> None:
    swapped = msgspec.structs.replace(THIRD.members[0], identity_key=device("x").identity_key)
    members = (swapped, *THIRD.members[1:])
    coordinator.serve(msgspec.structs.replace(THIRD, members=members))


def serve_backdated(coordinator: SmallCoordinator) -> None:
    late = msgspec.structs.replace(THIRD.members[2], since=NOW)
    members = (*THIRD.members[:2], late)
    coordinator.serve(msgspec.structs.replace(THIRD, members=members))


def serve_other_fleet(coordinator: SmallCoordinator) -> None:
    coordinator.serve(msgspec.structs.replace(THIRD, fleet="other"))


def serve_other_second(coordinator: SmallCoordinator) -> None:
    coordinator.serve(after(FIRST, THREE))


def serve_tampered(coordinator: SmallCoordinator) -> None:
    coordinator.serve(THIRD)
    coordinator.sealed = coordinator.sealed.replace(b'"sig":"', b'"sig":"AAAA')


def serve_nonsense(coordinator: SmallCoordinator) -> None:
    coordinator.sealed = b"[" * 30_000


@pytest.mark.parametrize(
    ("misbehave", "sentence"),
    [
        (serve_forged, "signed by no key that is trusted here"),
        (serve_fork, "has lost edge-1"),
        (serve_other_key, "gives edge-1 another key"),
        (serve_backdated, "lists edge-3 since before it was listed"),
        (serve_other_fleet, "of fleet 'other'"),
        (serve_other_second, "list 2 is not newer than 2"),
        (serve_tampered, "bad signature|not a signed envelope"),
        (serve_nonsense, "not a signed envelope"),
    ],
)
def test_a_list_that_cannot_follow_the_one_known_here_changes_nothing(
    coordinator: SmallCoordinator,
    enrolment: Enrolment,
    tmp_path: Path,
    misbehave: Callable[[SmallCoordinator], None],
    sentence: str,
) -> None:
    coordinator.serve(SECOND)
    before = members_for(tmp_path, enrolment, 2)
    misbehave(coordinator)
    with pytest.raises(PeerError, match=sentence):
        members_for(tmp_path, enrolment, 3)
    assert members_for(tmp_path, enrolment, 2) is before


def test_a_coordinator_cannot_show_an_older_list_than_the_one_known_here(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    coordinator.serve(SECOND)
    members_for(tmp_path, enrolment, 2)
    coordinator.serve(FIRST)
    with pytest.raises(PeerError, match="list 1 is not newer than 2"):
        members_for(tmp_path, enrolment, 3)
    assert members_for(tmp_path, enrolment, 1).keys() == {"edge-1", "edge-2"}


@pytest.mark.parametrize("known", [FIRST, None])
def test_a_sum_over_a_list_that_nobody_signed_is_refused(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path, known: object
) -> None:
    if known is not None:
        members_for(tmp_path, enrolment, 1)
    with pytest.raises(PeerError, match="names membership list 9 and the coordinator serves 1"):
        members_for(tmp_path, enrolment, 9)
    assert coordinator.requests


def test_a_device_without_a_pinned_fleet_key_has_no_peers(tmp_path: Path) -> None:
    unpinned = dataclasses.replace(enrolment_at("http://127.0.0.1:1"), fleet_keys={})
    with pytest.raises(PeerError, match="enrolled without a fleet key"):
        members_for(tmp_path, unpinned, 1)


def test_a_kept_list_that_was_altered_is_refused(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    members_for(tmp_path, enrolment, 1)
    (tmp_path / LIST_FILE).write_bytes(sign_list(THIRD, COMMAND_KEY))
    with pytest.raises(PeerError, match=r"is damaged .* delete it to fetch it again"):
        members_for(tmp_path, enrolment, 1)
    assert len(coordinator.requests) == 1


def test_a_busy_coordinator_is_asked_again(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    for status in (503, 502):
        coordinator.statuses.put(status)
    assert members_for(tmp_path, enrolment, 1)
    assert len(coordinator.requests) == 3


@pytest.mark.parametrize("status", [401, 404, 302, 500])
def test_a_coordinator_that_refuses_is_not_asked_again(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path, status: int
) -> None:
    coordinator.statuses.put(status)
    with pytest.raises(UnavailableError, match=f"HTTP {status}.*check the device's clock"):
        members_for(tmp_path, enrolment, 1)
    assert len(coordinator.requests) == 1


def test_a_coordinator_that_is_away_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    nobody = enrolment_at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError, match="does not answer"):
        members_for(tmp_path, nobody, 1, deadline_s=0.2)


def test_whoever_must_end_does_not_wait(tmp_path: Path) -> None:
    nobody, stop = enrolment_at(f"http://127.0.0.1:{free_port()}"), threading.Event()
    stop.set()
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        members_for(tmp_path, nobody, 1, stop=stop)
    assert time.monotonic() - began < PATIENCE_S


def test_a_list_that_drips_is_given_up_at_the_deadline(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    coordinator.pause_s = 0.1  # for every hundred bytes
    coordinator.serve(after(THIRD, *(device(f"more-{i}") for i in range(100))))
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="too slowly"):
        members_for(tmp_path, enrolment, 1, deadline_s=0.3)
    assert time.monotonic() - began < PATIENCE_S
    coordinator.pause_s = 0.0


def test_a_list_without_end_is_cut_off(
    coordinator: SmallCoordinator,
    enrolment: Enrolment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "MAX_SEALED_BYTES", len(coordinator.sealed) - 1)
    with pytest.raises(PeerError, match="sent a membership list of over"):
        members_for(tmp_path, enrolment, 1)
    assert not (tmp_path / LIST_FILE).exists()


def test_a_download_that_came_second_does_not_replace_a_newer_list(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    def sign_meanwhile() -> datetime:  # while the request is being made, another process has asked
        coordinator.serve(THIRD)
        members_for(tmp_path, enrolment, 3)
        coordinator.serve(SECOND)
        return NOW

    members = members_for(tmp_path, enrolment, 2, now=sign_meanwhile)
    assert members.keys() == {"edge-1", "edge-2", "edge-3"}
    assert members_for(tmp_path, enrolment, 3) is members


def test_several_at_once_keep_the_newest(
    coordinator: SmallCoordinator, enrolment: Enrolment, tmp_path: Path
) -> None:
    coordinator.serve(THIRD)
    found: SimpleQueue[int] = SimpleQueue()
    threads = [
        threading.Thread(
            target=lambda version=v: found.put(len(members_for(tmp_path, enrolment, version)))
        )
        for v in (1, 2, 3, 1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found.get(timeout=PATIENCE_S) for _ in threads] == [3] * 6
