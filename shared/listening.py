"""Where our listeners may bind, until device certificates exist: on this machine only."""

import errno
import ipaddress
import socket

from shared.errors import ConfigError, UnavailableError


def require_loopback(host: str, *, purpose: str) -> None:
    """Raise ConfigError unless ``host`` is a loopback address (or ``localhost``)."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"{purpose} cannot listen on {host!r}: devices have no certificates yet, so Shoal "
            "serves this machine only; use 127.0.0.1"
        )


def require_free_port(host: str, port: int, *, purpose: str, option: str) -> None:
    """Make sure that nothing listens on ``host:port`` yet.

    Args:
        host: address to listen on.
        port: 0 is always free.
        purpose: what would listen there.
        option: of the command line, with which a person chooses another port.

    Raises:
        UnavailableError: something already listens there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UnavailableError(
                f"port {port} on {host} is in use, so {purpose} cannot start; "
                f"stop the other program or choose another port with {option}"
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago, for children that must be told theirs."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
