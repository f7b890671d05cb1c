"""The coordinator's secrets, made at the first start and kept in files that only it may read.

The fleet key is apart from the others: what it signs, the membership list, protects devices from a
coordinator that lies, so it is worth most where the coordinator cannot reach it.
"""

import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.errors import ConfigError, PeerError
from shared.files import write_private
from shared.signing import SigningKey, VerifyingKey

logger = logging.getLogger(__name__)

ADMIN_TOKEN_FILE = "admin-token"  # noqa: S105  # the name of the file, not the token
FLEET_KEY_FILE = "fleet-key.pem"
FLEET_PUBLIC_FILE = "fleet-key.pub"  # base64 of the raw public key
FLEET_KEY_BESIDE = (
    "the fleet key lies beside the coordinator, so the membership list protects against no one "
    "who owns the coordinator; set fleet_key = 'offline' for that"
)

FleetKeyPlace = Literal["beside", "offline"]


@dataclass(frozen=True, slots=True)
class FleetKey:
    """What signs the membership list; the private half only where it lies beside us."""

    public: VerifyingKey
    private: SigningKey | None = field(repr=False)

    @property
    def place(self) -> FleetKeyPlace:
        """Where the private half is."""
        return "offline" if self.private is None else "beside"


@dataclass(frozen=True, slots=True)
class Keys:
    """Everything that lets a coordinator be recognised as itself."""

    command: SigningKey  # signs control messages and enrolment replies; join tokens pin it
    model: SigningKey  # signs manifests
    fleet: FleetKey
    admin_token: str  # what operators show to the API


def load_keys(home: Path, *, fleet_key: FleetKeyPlace = "beside") -> Keys:
    """Read the keys of ``home``; the missing ones are made, mode 0600.

    Raises:
        ConfigError: a file holds no key, or the fleet key is not where it should be.
    """
    try:
        command = SigningKey.load_or_create(home / "command-key.pem")
        model = SigningKey.load_or_create(home / "model-key.pem")
        fleet = _fleet_key_beside(home) if fleet_key == "beside" else _fleet_key_offline(home)
    except (ValueError, PeerError) as error:
        raise ConfigError(
            f"a key file in {home} cannot be read ({error}); put the backup copy back"
        ) from error
    return Keys(command, model, fleet, _admin_token(home / ADMIN_TOKEN_FILE))


def _fleet_key_beside(home: Path) -> FleetKey:
    """Read or make the fleet key; a lost one is not replaced, since all devices pin it."""
    private, public = home / FLEET_KEY_FILE, home / FLEET_PUBLIC_FILE
    if public.exists() and not private.exists():
        raise ConfigError(
            f"the fleet key {private} is missing and {public} is there; put it back, or set "
            "fleet_key = 'offline' if it was moved away on purpose"
        )
    key = SigningKey.load_or_create(private)
    if not public.exists():
        write_private(public, f"{key.public}\n".encode())
    elif _public_key(public).raw != key.public.raw:
        raise ConfigError(f"{private} and {public} are of two different keys; put the old one back")
    return FleetKey(key.public, key)


def _fleet_key_offline(home: Path) -> FleetKey:
    path = home / FLEET_PUBLIC_FILE
    if not path.exists():
        raise ConfigError(
            f"fleet_key is 'offline' and {path} is missing; make a key on another machine with "
            "'shoal membership new-key FILE.pem' and copy FILE.pub there"
        )
    if (home / FLEET_KEY_FILE).exists():
        logger.warning(
            "fleet_key is 'offline' but %s is still there: move it to another machine, "
            "or the membership list protects against no one who owns this coordinator",
            home / FLEET_KEY_FILE,
        )
    return FleetKey(_public_key(path), None)


def _public_key(path: Path) -> VerifyingKey:
    return VerifyingKey.from_text(path.read_text(encoding="utf-8").strip())


def _admin_token(path: Path) -> str:
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32).encode() + b"\n")
    return path.read_text(encoding="utf-8").strip()
