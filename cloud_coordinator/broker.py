"""The MQTT broker: embedded (iotcore), mosquitto as our child, or one that runs elsewhere.

The embedded broker knows no rights and forgets everything when it ends, so it serves this machine
only; mosquitto keeps sessions and retained messages. Either way the database is the truth and the
broker a cache. mosquitto's limits are raised because with its defaults it acknowledges a burst and
then silently drops part of it.
"""

import asyncio
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from shared.child import Child
from shared.errors import ConfigError, UnavailableError
from shared.listening import require_free_port, require_loopback
from shared.mqtt import MAX_PACKET_BYTES

BrokerKind = Literal["embedded", "mosquitto", "external"]
_START_DEADLINE_S = 15.0
_POLL_S = 0.02

_IOTCORE_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 500
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "mqtt5"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {packet_bytes}
max_inflight_count = 500
dynamic_filters = true
"""

_MOSQUITTO_CONFIG = """\
# Written by Shoal ('shoal broker config'); mosquitto 2.0 or newer, started in this folder.
per_listener_settings false
listener {port} {host}
# Anonymous, because devices have no certificates yet: the listener is on loopback only, and every
# message is signed end to end, so a stranger on this machine can delay or drop but forge nothing.
allow_anonymous true
persistence true
persistence_location {state}/
autosave_interval 30
persistent_client_expiration 30d
# With its defaults (1000 and 20) mosquitto acknowledges a burst and then drops part of it.
max_queued_messages 200000
max_inflight_messages 500
# Models travel over HTTP; ours are the same limits, so that nobody is cut off for his size.
message_size_limit {packet_bytes}
max_packet_size {packet_bytes}
max_keepalive 1200
set_tcp_nodelay true
log_dest stderr
log_type error
log_type warning
"""


@dataclass(frozen=True, slots=True)
class BrokerPlan:
    """Which broker, and where."""

    kind: BrokerKind
    host: str
    port: int

    @property
    def url(self) -> str:
        """What clients are told."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt://{host}:{self.port}"


def plan_broker(choice: str, *, host: str, port: int) -> BrokerPlan:
    """Read the setting ``broker``.

    Args:
        choice: ``embedded``, ``mosquitto`` or ``mqtt://host:port``.
        host: where a broker of ours listens.
        port: its port.

    Raises:
        ConfigError: another word, or an address that is not loopback.
    """
    if choice in {"embedded", "mosquitto"}:
        require_loopback(host, purpose=f"the {choice} broker")
        return BrokerPlan("embedded" if choice == "embedded" else "mosquitto", host, port)
    parts = urlsplit(choice)
    if parts.scheme != "mqtt" or not parts.hostname:
        raise ConfigError(
            f"broker {choice!r} is not known; write embedded, mosquitto or mqtt://host:port"
        )
    return BrokerPlan("external", parts.hostname, parts.port or 1883)


def mosquitto_config(*, host: str, port: int, state: Path) -> str:
    """Return the configuration under which mosquitto passes our contract tests."""
    return _MOSQUITTO_CONFIG.format(
        host=host, port=port, state=state, packet_bytes=MAX_PACKET_BYTES
    )


def write_mosquitto_config(folder: Path, *, host: str, port: int) -> Path:
    """Write ``mosquitto.conf`` and its state folder into ``folder``; return the file."""
    state = Path("mosquitto")  # relative: mosquitto is started in the folder
    (folder / state).mkdir(parents=True, exist_ok=True)
    path = folder / "mosquitto.conf"
    path.write_text(mosquitto_config(host=host, port=port, state=state), encoding="utf-8")
    return path


async def start_broker(plan: BrokerPlan, *, home: Path) -> Child:
    """Start a broker of ours and return it once it accepts connections.

    Args:
        plan: embedded or mosquitto; an external one is nobody's child.
        home: the coordinator's folder; configuration and state go to ``broker/``, its log to
            ``logs/``.

    Raises:
        UnavailableError: the port is in use, the program is missing, or it does not come up.
    """
    purpose = f"the {plan.kind} broker"
    require_free_port(plan.host, plan.port, purpose=purpose, option="--mqtt-port")
    folder = home / "broker"
    folder.mkdir(parents=True, exist_ok=True)
    argv = (
        _embedded_argv(plan, folder) if plan.kind == "embedded" else _mosquitto_argv(plan, folder)
    )
    child = await Child.start(argv, name="broker", log_path=home / "logs" / "broker.log")
    try:
        await _wait_until_listening(child, plan)
    except BaseException:
        await child.stop()
        raise
    return child


def _embedded_argv(plan: BrokerPlan, folder: Path) -> list[str]:
    config = folder / "rumqttd.toml"
    config.write_text(
        _IOTCORE_CONFIG.format(host=plan.host, port=plan.port, packet_bytes=MAX_PACKET_BYTES),
        encoding="utf-8",
    )
    options = msgspec.json.encode({"config_path": str(config)}).decode()
    return [sys.executable, "-m", "iotcore._serve", options]  # ends when its standard input closes


def _mosquitto_argv(plan: BrokerPlan, folder: Path) -> list[str]:
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise UnavailableError(
            "mosquitto is not installed; install the package 'mosquitto' or use --broker embedded"
        )
    config = write_mosquitto_config(folder, host=plan.host, port=plan.port)
    return [
        sys.executable,
        "-m",
        "cloud_coordinator.leash",
        str(folder),
        program,
        "-c",
        config.name,
    ]


async def _wait_until_listening(child: Child, plan: BrokerPlan) -> None:
    deadline = asyncio.get_running_loop().time() + _START_DEADLINE_S
    while asyncio.get_running_loop().time() < deadline:
        if child.returncode is not None:
            raise UnavailableError(
                f"the {plan.kind} broker ended at once ({child.log_tail() or child.returncode}); "
                f"see {child.log_path}"
            )
        try:
            _, writer = await asyncio.open_connection(plan.host, plan.port)
        except OSError:
            await asyncio.sleep(_POLL_S)
        else:
            writer.close()
            return
    raise UnavailableError(
        f"the {plan.kind} broker does not listen on {plan.url} after {_START_DEADLINE_S:.0f} s; "
        f"see {child.log_path}"
    )
