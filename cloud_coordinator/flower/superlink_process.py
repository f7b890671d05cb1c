"""The SuperLink child: Flower's SuperLink app behind two TLS listeners on loopback.

State lives in memory, because the coordinator's database is the truth: after a crash the keys are
registered again and runs go on from their last commit. The parent registers node keys over the
pipe, so nobody needs the Control API for that.
"""

import logging
import os
import socket
import threading
from pathlib import Path

import uvicorn
from flwr.common.constant import (
    ISOLATION_MODE_PROCESS,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
)
from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.error import FlowerError
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.servicer.control import control_handlers

from cloud_coordinator.flower.lean_listener import LeanListener
from cloud_coordinator.flower.superlink_messages import (
    QUIET_FLOWER,
    FromSuperLink,
    NodeRefused,
    NodeRegistered,
    NodeUnregistered,
    RegisterNode,
    StartSuperLink,
    SuperLinkReady,
    SuperLinkSecrets,
    ToSuperLink,
    UnregisterNode,
)
from shared.child import ParentLink, die_with_parent
from shared.logs import configure_logging

logger = logging.getLogger(__name__)
_HOST = "127.0.0.1"
_START_DEADLINE_S = 30.0
_KEEP_ALIVE_S = 75  # longer than our clients keep idle connections, so that they close first
_OWNER = AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)


class _Server(uvicorn.Server):
    """Tells the parent once both listeners accept."""

    def __init__(
        self, config: uvicorn.Config, link: ParentLink[ToSuperLink], ready: SuperLinkReady
    ) -> None:
        super().__init__(config)
        self._link = link
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._link.send(self._ready)


def main() -> None:
    """Serve until the parent closes the pipe or sends SIGTERM."""
    die_with_parent()
    configure_logging("WARNING")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    _require_quiet_flower()
    link: ParentLink[ToSuperLink] = ParentLink(ToSuperLink)
    start = link.incoming.get(timeout=_START_DEADLINE_S)
    assert isinstance(start, StartSuperLink)
    private, public = _listen(0), _listen(start.public_port)
    ready = SuperLinkReady(private.getsockname()[1], public.getsockname()[1])
    secrets = SuperLinkSecrets.read(Path(start.secrets_path))
    app = create_app(flower_config(secrets, ready.private_port), SuperLinkLifespan)
    listener = LeanListener(app, private_port=ready.private_port, control_secret=secrets.control)
    server = _Server(_uvicorn_config(listener, start), link, ready)
    threading.Thread(
        target=_obey,
        args=(link, app.state.linkstate_factory.state(), server),
        name="parent",
        daemon=True,
    ).start()
    server.run(sockets=[private, public])


def _require_quiet_flower() -> None:
    """Refuse to run where Flower would phone home; it reads these when it is imported."""
    loud = [name for name, value in QUIET_FLOWER.items() if os.environ.get(name) != value]
    if loud:
        raise SystemExit(f"set {', '.join(loud)} as cloud_coordinator/flower/superlink.py does")


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((_HOST, port))
    return listener


def flower_config(secrets: SuperLinkSecrets, port: int) -> SuperLinkLifespanConfig:
    """Return what Flower's own command line would have made of our options."""
    return SuperLinkLifespanConfig(
        host=_HOST,
        port=port,
        insecure=False,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation=ISOLATION_MODE_PROCESS,
        superexec_auth_secret=bytes.fromhex(secrets.superexec),
        enable_supernode_auth=True,
        runtime_dependency_install=False,
        authn_plugin=NoOpControlAuthnPlugin(),
        enable_event_log=False,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        artifact_provider=None,
        simulation=False,
        # What follows configures gRPC servers and helper processes that we never start.
        certificates=None,
        control_address="",
        health_server_address=None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
    )


def _uvicorn_config(listener: LeanListener, start: StartSuperLink) -> uvicorn.Config:
    return uvicorn.Config(
        listener,
        ssl_certfile=start.certificate_path,
        ssl_keyfile=start.key_path,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=2,
        ws="none",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="warning",
    )


def _obey(link: ParentLink[ToSuperLink], state: LinkState, server: uvicorn.Server) -> None:
    """Do what the parent says until it closes the pipe; Flower's state locks by itself."""
    while (message := link.incoming.get()) is not None:
        link.send(_answer(message, state))
    server.should_exit = True


def _answer(message: ToSuperLink, state: LinkState) -> FromSuperLink:
    match message:
        case RegisterNode():
            return _register(message, state)
        case UnregisterNode():
            return _unregister(message, state)
        case StartSuperLink():
            raise AssertionError("started twice")


def _register(message: RegisterNode, state: LinkState) -> FromSuperLink:
    try:
        # Flower compares keys as bytes, so they must be those that Flower itself would write.
        public_key = public_key_to_bytes(bytes_to_public_key(message.public_key_pem.encode()))
        known = state.get_node_id_by_public_key(public_key)
        if known is not None:
            return NodeRegistered(message.request, known)
        request = RegisterNodeRequest(public_key=public_key, name=message.name)
        node_id = control_handlers.register_node(request, _OWNER, state).node_id
    except (FlowerError, ValueError) as error:
        logger.warning("node %s refused: %s", message.name, error)
        return NodeRefused(
            message.request,
            f"the SuperLink refuses the node key of {message.name}: it is no NIST curve key, or "
            "was unregistered in this life; enrol the device again with a new key",
        )
    return NodeRegistered(message.request, node_id)


def _unregister(message: UnregisterNode, state: LinkState) -> FromSuperLink:
    request = UnregisterNodeRequest(node_id=message.node_id)
    try:
        control_handlers.unregister_node(request, _OWNER, state)
    except FlowerError:
        logger.info("node %d was not registered", message.node_id)
    return NodeUnregistered(message.request)


if __name__ == "__main__":
    main()
