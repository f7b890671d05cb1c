"""The brokers that the coordinator starts, and what it says when one cannot be started."""

import asyncio
import gc
import random
import shutil
import signal
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloud_coordinator.broker import (
    BrokerPlan,
    broker_ca_pem,
    mosquitto_config,
    plan_broker,
    start_broker,
    write_mosquitto_config,
)
from cloud_coordinator.flower.tls import ensure_tls
from shared.errors import ConfigError, UnavailableError
from shared.listening import free_port
from shared.messages import MAX_MESSAGE_BYTES
from shared.mqtt import MqttSession, Outgoing
from tests.system_packages import require_program

TIME_LIMIT_S = 30.0


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest) -> BrokerPlan:
    if request.param == "mosquitto":
        require_program("mosquitto", package="mosquitto")
    return plan_broker(request.param, host="127.0.0.1", port=free_port())


async def test_a_message_as_large_as_ours_may_be_passes_through(
    broker: BrokerPlan, tmp_path: Path
) -> None:
    arrived = asyncio.Event()

    async def take(topic: str, payload: bytes) -> None:
        if (topic, len(payload)) == ("t", MAX_MESSAGE_BYTES):
            arrived.set()

    async def say() -> None:
        await session.publish(Outgoing("t", b"x" * MAX_MESSAGE_BYTES))

    session = MqttSession(
        broker.url,
        client_id="one",
        subscriptions=["t"],
        will=None,
        on_message=take,
        on_connect=say,
        rng=random.Random(1),  # noqa: S311  # jitter
    )
    child = await start_broker(broker, home=tmp_path)
    running = asyncio.create_task(session.run())
    try:
        await asyncio.wait_for(arrived.wait(), TIME_LIMIT_S)
    finally:
        running.cancel()
        await asyncio.wait({running})
        await child.stop()
    assert child.returncode is not None


async def test_mosquitto_is_not_root_even_if_we_are_and_keeps_what_was_retained(
    tmp_path: Path,
) -> None:
    require_program("mosquitto", package="mosquitto")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    plan = plan_broker("mosquitto", host="127.0.0.1", port=free_port())
    child = await start_broker(plan, home=home)
    status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")  # noqa: ASYNC240  # no disk
    await child.stop()

    (users,) = [line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")]
    assert "0" not in users
    assert (home / "broker" / "mosquitto" / "mosquitto.db").exists()


async def test_a_port_in_use_is_one_sentence(broker: BrokerPlan, tmp_path: Path) -> None:
    sentence = r"in use, so the .* broker cannot start"
    with (
        socket.create_server((broker.host, broker.port)),
        pytest.raises(UnavailableError, match=sentence) as caught,
    ):
        await start_broker(broker, home=tmp_path)
    assert "\n" not in str(caught.value)


async def test_a_broker_dies_with_whoever_started_it(broker: BrokerPlan, tmp_path: Path) -> None:
    starter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _START_AND_WAIT, broker.kind, str(broker.port), str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert starter.stdout is not None
    pid = int(await asyncio.wait_for(starter.stdout.readline(), TIME_LIMIT_S))
    starter.send_signal(signal.SIGKILL)
    await starter.wait()
    async with asyncio.timeout(TIME_LIMIT_S):
        while _is_alive(pid):  # noqa: ASYNC110  # the end of another's child has no event
            await asyncio.sleep(0.05)


_START_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from cloud_coordinator.broker import plan_broker, start_broker

async def main():
    plan = plan_broker(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]))
    child = await start_broker(plan, home=Path(sys.argv[3]))
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main())
"""


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_a_missing_mosquitto_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    plan = plan_broker("mosquitto", host="127.0.0.1", port=free_port())
    with pytest.raises(UnavailableError, match="install the package 'mosquitto' or use --broker"):
        await start_broker(plan, home=tmp_path)


async def test_a_broker_that_ends_at_once_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/bin/false")
    plan = plan_broker("mosquitto", host="127.0.0.1", port=free_port())
    with pytest.raises(UnavailableError, match=r"ended at once \(1\); see .*broker.log"):
        await start_broker(plan, home=tmp_path)


@pytest.mark.parametrize("choice", ["embedded", "mosquitto"])
def test_a_broker_of_ours_listens_on_loopback_only(choice: str) -> None:
    with pytest.raises(ConfigError, match="devices have no certificates yet"):
        plan_broker(choice, host="192.168.1.5", port=1)


def test_a_broker_elsewhere_is_a_url() -> None:
    plan = plan_broker("mqtt://broker.example:1999", host="127.0.0.1", port=1)
    assert (plan.kind, plan.url) == ("external", "mqtt://broker.example:1999")
    assert plan_broker("mqtt://b", host="127.0.0.1", port=1).port == 1883


def test_a_broker_elsewhere_may_have_a_certificate_of_its_own_authority(tmp_path: Path) -> None:
    ca = ensure_tls(tmp_path, now=datetime.now(UTC)).ca
    plan = plan_broker("mqtts://b", host="127.0.0.1", port=1, ca=ca)
    assert (plan.url, plan.ca_pem) == ("mqtts://b:8883", ca.read_text())
    assert plan_broker("mqtts://b", host="127.0.0.1", port=1).ca_pem == ""


@pytest.mark.parametrize(
    ("choice", "content", "sentence"),
    [
        ("mqtt://b", "", "broker_ca is for a broker at mqtts://host:port"),
        ("mosquitto", "", "broker_ca is for a broker at mqtts://host:port"),
        ("mqtts://b", "no certificate", "is no readable certificate in PEM form"),
        ("mqtts://b", None, "is no readable certificate in PEM form"),
    ],
)
def test_an_authority_that_cannot_be_used_is_refused(
    choice: str, content: str | None, sentence: str, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    if content is not None:
        ca.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        plan_broker(choice, host="127.0.0.1", port=1, ca=ca)


# paho leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket")
async def test_mosquitto_speaks_tls_with_those_who_know_its_authority(tmp_path: Path) -> None:
    require_program("mosquitto", package="mosquitto")
    plan = BrokerPlan("mosquitto", "127.0.0.1", free_port(), tls=True)
    child = await start_broker(plan, home=tmp_path)
    connected = asyncio.Event()

    async def note() -> None:
        connected.set()

    async def ignore(*_: object) -> None:
        pass

    def session(name: str, ca_pem: str) -> MqttSession:
        return MqttSession(
            plan.url,
            client_id=name,
            subscriptions=["t"],
            will=None,
            on_message=ignore,
            on_connect=note if ca_pem else ignore,
            rng=random.Random(1),  # noqa: S311  # jitter
            ca_pem=ca_pem,
        )

    stranger = session("stranger", "")
    running = [
        asyncio.create_task(each.run())
        for each in (stranger, session("friend", broker_ca_pem(tmp_path)))
    ]
    try:
        await asyncio.wait_for(connected.wait(), TIME_LIMIT_S)
        with pytest.raises(UnavailableError):
            await stranger.publish(Outgoing("t", b""))
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        await child.stop()
        gc.collect()


def test_a_session_refuses_an_authority_that_is_no_certificate() -> None:
    with pytest.raises(ConfigError, match="no certificate in PEM form"):
        MqttSession(
            "mqtts://127.0.0.1",
            client_id="x",
            subscriptions=(),
            will=None,
            on_message=lambda *_: asyncio.sleep(0),
            on_connect=lambda: asyncio.sleep(0),
            rng=random.Random(1),  # noqa: S311  # jitter
            ca_pem="rubbish",
        )


@pytest.mark.parametrize("choice", ["rabbit", "http://x", "mqtt://"])
def test_another_broker_is_refused_with_what_to_write(choice: str) -> None:
    with pytest.raises(ConfigError, match="write embedded, mosquitto or mqtt://host:port"):
        plan_broker(choice, host="127.0.0.1", port=1)


def test_the_mosquitto_configuration_avoids_the_silent_losses(tmp_path: Path) -> None:
    path = write_mosquitto_config(tmp_path, host="127.0.0.1", port=1883)
    lines = path.read_text().splitlines()
    assert "max_queued_messages 200000" in lines
    assert "max_inflight_messages 500" in lines
    assert "listener 1883 127.0.0.1" in lines
    assert "persistence_location mosquitto/" in lines
    assert mosquitto_config(host="::1", port=1, state=tmp_path).count("listener 1 ::1") == 1
