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
from cryptography import x509

from cloud_coordinator.flower.tls import ensure_tls
from shared.child import Child
from shared.errors import ConfigError, UnavailableError
from shared.listening import require_free_port, require_loopback
from shared.messages import utc_now
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
_MOSQUITTO_TLS = """\
certfile {certificate}
keyfile {key}
tls_version tlsv1.3
"""
_TLS_FOLDER = Path("tls")  # below the broker's folder
_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class BrokerPlan:
    """Which broker, and where."""

    kind: BrokerKind
    host: str
    port: int
    tls: bool = False  # the embedded broker knows none
    ca_pem: str = ""  # what an external broker's certificate is signed by; empty: a known CA

    @property
    def url(self) -> str:
        """What clients are told."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def plan_broker(choice: str, *, host: str, port: int, ca: Path | None = None) -> BrokerPlan:
    """Read the settings ``broker`` and ``broker_ca``.

    Args:
        choice: ``embedded``, ``mosquitto``, ``mqtt://host:port`` or ``mqtts://host:port``.
        host: where a broker of ours listens.
        port: its port.
        ca: PEM file of the CA of a broker that runs elsewhere; None: a CA that the system knows.

    Raises:
        ConfigError: another word, an address that is not loopback, or a CA that cannot be used.
    """
    if ca is not None and not choice.startswith("mqtts://"):
        raise ConfigError("broker_ca is for a broker at mqtts://host:port; leave it out")
    if choice in {"embedded", "mosquitto"}:
        require_loopback(host, purpose=f"the {choice} broker")
        return BrokerPlan("embedded" if choice == "embedded" else "mosquitto", host, port)
    parts = urlsplit(choice)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigError(
            f"broker {choice!r} is not known; write embedded, mosquitto or mqtt://host:port, "
            "or mqtts:// for TLS"
        )
    return BrokerPlan(
        "external",
        parts.hostname,
        parts.port or _PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        ca_pem="" if ca is None else _read_ca(ca),
    )


def _read_ca(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii")
        x509.load_pem_x509_certificates(text.encode())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"broker_ca {path} is no readable certificate in PEM form; check the path"
        ) from error
    return text


def mosquitto_config(
    *,
    host: str,
    port: int,
    state: Path,
    certificate: Path | None = None,
    key: Path | None = None,
) -> str:
    """Return the configuration under which mosquitto passes our contract tests.

    Args:
        host: where it listens.
        port: its port.
        state: folder of what it keeps.
        certificate: PEM file; with it, and its ``key``, the listener speaks TLS.
        key: PEM file.
    """
    config = _MOSQUITTO_CONFIG.format(
        host=host, port=port, state=state, packet_bytes=MAX_PACKET_BYTES
    )
    if certificate is None:
        return config
    return config + _MOSQUITTO_TLS.format(certificate=certificate, key=key)


def write_mosquitto_config(
    folder: Path,
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Path:
    """Write ``mosquitto.conf`` and its state folder into ``folder``; return the file.

    Args:
        folder: in which mosquitto is started, so that all paths may be relative to it.
        host: where it listens.
        port: its port.
        certificate: see `mosquitto_config`.
        key: see `mosquitto_config`.
    """
    state = Path("mosquitto")
    (folder / state).mkdir(parents=True, exist_ok=True)
    path = folder / "mosquitto.conf"
    config = mosquitto_config(host=host, port=port, state=state, certificate=certificate, key=key)
    path.write_text(config, encoding="utf-8")
    return path


def broker_ca_pem(home: Path) -> str:
    """Return the CA of our own mosquitto with TLS, once `start_broker` made it."""
    return (home / "broker" / _TLS_FOLDER / "ca.pem").read_text(encoding="ascii")


async def start_broker(plan: BrokerPlan, *, home: Path) -> Child:
    """Start a broker of ours and return it once it accepts connections.

    Args:
        plan: embedded or mosquitto; an external one is nobody's child. With TLS, mosquitto gets a
            certificate of a CA of its own, see `broker_ca_pem`.
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
    certificate, key = None, None
    if plan.tls:
        tls = ensure_tls(folder / _TLS_FOLDER, now=utc_now())
        certificate, key = tls.certificate.relative_to(folder), tls.key.relative_to(folder)
    config = write_mosquitto_config(
        folder, host=plan.host, port=plan.port, certificate=certificate, key=key
    )
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
