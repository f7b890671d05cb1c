"""What the coordinator, its SuperLink child and the run workers must agree on; free of Flower."""

from pathlib import Path

import msgspec

from shared.errors import UnavailableError

CONTROL_SECRET_HEADER = "shoal-control-secret"  # noqa: S105  # the header's name, not its value
# Flower reports to its makers, asks for updates and installs dependencies unless told not to.
QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


class SuperLinkSecrets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who holds these may start and run runs. Fresh in every life of the SuperLink."""

    control: str  # hex; demanded on /v1/control/*, which Flower itself leaves open
    superexec: str  # hex; Flower's own secret for acquiring tasks

    @classmethod
    def read(cls, path: Path) -> "SuperLinkSecrets":
        """Read the file (mode 0600) that the coordinator wrote.

        Raises:
            UnavailableError: it is not there; the SuperLink has not been started.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise UnavailableError(
                f"cannot read the SuperLink's secrets at {path}; start the SuperLink first"
            ) from error


class StartSuperLink(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First line to the child."""

    public_port: int  # 0: any free one
    certificate_path: str
    key_path: str
    secrets_path: str


class RegisterNode(msgspec.Struct, frozen=True, tag="register"):
    """Let this node key in. Answered by `NodeRegistered` or `NodeRefused`."""

    request: int  # the parent's number, repeated in the answer
    public_key_pem: str
    name: str


class UnregisterNode(msgspec.Struct, frozen=True, tag="unregister"):
    """Shut this node out, at once and for this life. Answered by `NodeUnregistered`."""

    request: int
    node_id: int


ToSuperLink = StartSuperLink | RegisterNode | UnregisterNode


class SuperLinkReady(msgspec.Struct, frozen=True, tag="ready"):
    """Both listeners accept connections."""

    private_port: int
    public_port: int


class NodeRegistered(msgspec.Struct, frozen=True, tag="registered"):
    """The key is let in under this node id (the same one as before, if it was in already)."""

    request: int
    node_id: int


class NodeUnregistered(msgspec.Struct, frozen=True, tag="unregistered"):
    """The node is out; also said where it never was in."""

    request: int


class NodeRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The key cannot be let in."""

    request: int
    cause: str


FromSuperLink = SuperLinkReady | NodeRegistered | NodeUnregistered | NodeRefused
