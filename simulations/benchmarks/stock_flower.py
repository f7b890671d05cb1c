"""The reference: stock Flower, its own SuperLink, SuperNodes and processes for every message."""

import json
import os
import signal
import ssl
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from cloud_coordinator.flower.run_bundle import run_bundle
from cloud_coordinator.flower.superlink_messages import QUIET_FLOWER
from cloud_coordinator.flower.tls import TlsFiles, ensure_tls
from shared.errors import UnavailableError
from shared.listening import free_port
from simulations.benchmarks.probe_apps import CLIENT_APP, SERVER_APP, TASK

_SCRIPTS = Path(sysconfig.get_path("scripts"))
_START_DEADLINE_S = 60.0
_RUN_DEADLINE_S = 240.0
_STOP_DEADLINE_S = 20.0
_POLL_S = 0.2


def stock_round_seconds(nodes: int, *, rounds: int) -> Sequence[float]:
    """Time rounds with an empty ClientApp on stock Flower with subprocess isolation.

    Raises:
        UnavailableError: Flower did not come up or finish in time.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-stock-") as name, ExitStack() as stack:
        folder = Path(name)
        tls = ensure_tls(folder, now=datetime.now(UTC))
        port = free_port()
        stack.enter_context(_program(folder, "flower-superlink", *_superlink_options(tls, port)))
        _wait(lambda: _is_up(tls, port), _START_DEADLINE_S, "its SuperLink")
        control = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            insecure=False,
            root_certificates=tls.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        with control:
            for index in range(nodes):
                options = _supernode_options(folder, tls, port, control, index)
                stack.enter_context(_program(folder, "flower-supernode", *options))
            result = folder / "result.json"
            _start_run(control, {"nodes": nodes, "rounds": rounds, "result": str(result)})
            _wait(result.exists, _RUN_DEADLINE_S, f"{rounds} rounds of {nodes} nodes")
        seconds: list[float] = json.loads(result.read_text(encoding="utf-8"))
        return seconds


def _superlink_options(tls: TlsFiles, port: int) -> Sequence[str]:
    return (
        f"--ssl-certfile={tls.certificate}",
        f"--ssl-keyfile={tls.key}",
        f"--ssl-ca-certfile={tls.ca}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    )


def _supernode_options(
    folder: Path, tls: TlsFiles, port: int, control: ControlHttpClient, index: int
) -> Sequence[str]:
    """Make and register a node key; return the options of the SuperNode that holds it."""
    key = generate_private_key(SECP384R1())
    path = folder / f"node-{index}.key"
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = public_key_to_bytes(key.public_key())
    control.RegisterNode(RegisterNodeRequest(public_key=public, name=f"node-{index}"))
    return (
        f"--superlink=127.0.0.1:{port}",
        f"--root-certificates={tls.ca}",
        f"--auth-supernode-private-key={path}",
        f"--port={free_port()}",
    )


def _start_run(control: ControlHttpClient, config: dict[str, str | int]) -> None:
    bundle = run_bundle(
        TASK, client_app=CLIENT_APP, server_app=SERVER_APP, config=dict.fromkeys(config, "")
    )
    overrides = user_config_to_proto({name: str(value) for name, value in config.items()})
    control.StartRun(StartRunRequest(fab=fab_to_proto(bundle), override_config=overrides))


@contextmanager
def _program(folder: Path, name: str, *options: str) -> Iterator[None]:
    """Run one of Flower's programs, and end it with all that it started."""
    environment = {
        **os.environ,
        **QUIET_FLOWER,
        "FLWR_HOME": str(folder / "flwr-home"),
        "PATH": f"{_SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [_SCRIPTS / name, *options],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_up(tls: TlsFiles, port: int) -> bool:
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        with httpx.Client(verify=context, trust_env=False) as client:
            return client.get(f"https://127.0.0.1:{port}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _wait(done: Callable[[], bool], deadline_s: float, what: str) -> None:
    deadline = time.monotonic() + deadline_s
    while not done():
        if time.monotonic() > deadline:
            raise UnavailableError(f"stock Flower did not manage {what} in {deadline_s:.0f} s")
        time.sleep(_POLL_S)
