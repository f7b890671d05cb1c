"""Secure sums whose devices use another process for every message, as stock SuperNodes do."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent import kept_sums
from edge_agent.keeper_messages import Answer, Failed, Open, Opened, Said
from edge_agent.kept_sums import KeptSums, stop_keeper
from edge_agent.privacy.sources import DataUse
from edge_agent.sum_keeper import PLACE_FILE, Keeper
from shared.errors import PeerError, PolicyError, UnavailableError
from shared.messages import utc_now
from shared.secure_sum.config import (
    CONFIG_PAYLOAD_TYPE,
    SumConfig,
    digest_of,
    encode_config,
)
from shared.secure_sum.encoding import decode_sum
from shared.secure_sum.messages import SignedAnswer, decode, encode
from shared.secure_sum.server import SumServer
from shared.signing import seal
from tests.enrolled_homes import FLEET, EnrolledHomes, enrol_homes
from tests.unit.edge_agent.sum_fleet import SERVER_KEY, SMALL_POLICY, config_of

NAMES = ("edge-0", "edge-1", "edge-2")


class Homes:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.homes = {name: folder / name for name in NAMES}
        self.enrolled: EnrolledHomes = enrol_homes(self.homes, policy=SMALL_POLICY)

    def sums(self, name: str) -> KeptSums:
        """Return what another message's process would use."""
        return KeptSums(self.homes[name], keeper=self.folder)

    def config(self) -> SumConfig:
        return config_of(fleet=FLEET, expires_at=utc_now() + timedelta(hours=1))

    def seal(self, config: SumConfig) -> bytes:
        key = self.enrolled.command_key
        return seal(encode_config(config), payload_type=CONFIG_PAYLOAD_TYPE, key=key)

    def use(self, name: str) -> DataUse:
        return self.sums(name).data_use(name="d", path=f"/data/{name}", digest="a", part="train")

    def open(self, name: str, config: SumConfig, **changes: str) -> bytes:
        """Open and advertise."""
        sums = self.sums(name)
        received = {
            "task_digest": config.task_digest,
            "question_digest": config.question_digest,
            "base_digest": config.base_digest,
            **changes,
        }
        opened = sums.open(self.seal(config), data=self.use(name), **received)  # type: ignore[arg-type]
        vector = np.full(4, 0.1 * (1 + NAMES.index(name)), np.float32)
        return sums.advertise(opened, vector, {"examples": 10.0})


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Homes]:
    yield Homes(tmp_path)
    stop_keeper(tmp_path)
    if (keeper := kept_sums._started.pop(tmp_path, None)) is not None:
        keeper.wait(20)


def pid_of(folder: Path) -> int:
    return kept_sums._started[folder].pid


def test_a_sum_is_made_though_each_message_meets_another_process(homes: Homes) -> None:
    config = homes.config()
    members = homes.enrolled.members
    digest = digest_of(encode_config(config))
    server = SumServer(config, digest, members=members, server_key=SERVER_KEY)
    for name in NAMES:
        server.take_advertised(read(homes.open(name, config)))
    roster = encode(server.close_advertising())
    for name in NAMES:
        server.take_shared(read(homes.sums(name).answer(config.session, "share", roster)))
    for name, boxes in server.close_sharing().items():
        answer, lanes = homes.sums(name).mask(config.session, encode(boxes))
        assert lanes is not None
        again, same = homes.sums(name).mask(config.session, encode(boxes))
        assert (again, same and same.digest()) == (answer, lanes.digest())
        server.take_masked(read(answer), lanes)
    survivors = encode(server.close_masking())
    for name in NAMES:
        server.take_consent(read(homes.sums(name).answer(config.session, "consent", survivors)))
    unmask = encode(server.close_consent())
    for name in NAMES:
        server.take_revealed(read(homes.sums(name).answer(config.session, "reveal", unmask)))

    total, exact = decode_sum(config, server.finish().lanes, count=3)
    np.testing.assert_allclose(total, 0.6, atol=0.01)
    assert exact == {"examples": 30.0}
    assert len(keepers(homes.folder)) == 1  # one, however many messages and homes


def read(answer: bytes) -> SignedAnswer:
    return decode(answer, SignedAnswer)


def test_nobody_but_this_user_reaches_the_keeper(homes: Homes) -> None:
    homes.open("edge-0", homes.config())

    place = Path(msgspec.json.decode((homes.folder / PLACE_FILE).read_bytes()))
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((homes.folder / PLACE_FILE).stat().st_mode) == 0o600
    stop_keeper(homes.folder)
    kept_sums._started[homes.folder].wait(20)
    assert not place.parent.exists()


def test_errors_come_back_as_what_they_are(homes: Homes) -> None:
    config = homes.config()
    with pytest.raises(PeerError, match="is not the one it was signed for"):
        homes.open("edge-0", config, question_digest="9" * 64)
    (homes.homes["edge-0"] / "policy.toml").unlink()
    with pytest.raises(PolicyError, match="min_cohort = 18 in policy"):
        homes.open("edge-0", config)
    with pytest.raises(PeerError, match="no such session"):
        homes.sums("edge-0").answer(config.session, "share", b"")


def test_what_a_killed_keeper_held_is_lost_and_refused(homes: Homes) -> None:
    config = homes.config()
    homes.open("edge-0", config)
    os.kill(pid_of(homes.folder), signal.SIGKILL)
    kept_sums._started[homes.folder].wait(20)

    refusal = read(homes.sums("edge-0").answer(config.session, "share", b"roster"))

    assert refusal.body == b""
    assert "lost" in refusal.refusal


def test_secrets_rest_on_no_disk(homes: Homes) -> None:
    """All that is in the homes is searched for what only memory may hold: the vector itself."""
    homes.open("edge-1", homes.config())

    vector = np.full(4, 0.2, np.float32).tobytes()
    files = [path for path in homes.folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if vector in path.read_bytes()]


class Clock:
    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> object:
        return self.now


def test_a_keeper_is_needed_while_a_session_may_be_open_and_a_while_after_a_call(
    homes: Homes,
) -> None:
    clock = Clock()
    keeper = Keeper(now=clock)  # type: ignore[arg-type]
    home, config = str(homes.homes["edge-0"]), homes.config()
    assert keeper.is_needed()
    clock.now += timedelta(minutes=3)
    assert not keeper.is_needed()

    opened = keeper.answer(
        Open(
            home=home,
            sealed_config=homes.seal(config),
            task_digest=config.task_digest,
            question_digest=config.question_digest,
            base_digest=config.base_digest,
            data=homes.use("edge-0"),
        )
    )
    assert isinstance(opened, Opened)
    clock.now += timedelta(minutes=30)
    assert keeper.is_needed()
    clock.now += timedelta(minutes=30)
    assert not keeper.is_needed()
    late = keeper.answer(Answer(home=home, session=config.session, stage="share", question=b""))
    assert isinstance(late, Said | Failed)
    assert keeper.is_needed()
    keeper.close()


def test_a_keeper_that_cannot_start_is_named_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_sums, "_START_DEADLINE_S", 0.0)
    monkeypatch.setattr(kept_sums, "_start", lambda _: None)
    with pytest.raises(UnavailableError, match=r"did not start; see .*sum-keeper\.log"):
        KeptSums(tmp_path).answer(bytes(32), "share", b"")


def keepers(folder: Path) -> list[int]:
    """Return the processes that keep ``folder``, from /proc."""
    argv = [sys.executable, "-m", "edge_agent.sum_keeper", str(folder)]
    wanted = b"\0".join(map(str.encode, argv)) + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_of_two_keepers_of_a_folder_the_second_ends_at_once(homes: Homes) -> None:
    homes.open("edge-0", homes.config())

    second = subprocess.run(
        [sys.executable, "-m", "edge_agent.sum_keeper", str(homes.folder)], check=False, timeout=60
    )

    assert second.returncode == 0
    assert keepers(homes.folder) == [pid_of(homes.folder)]
