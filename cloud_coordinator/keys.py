"""The coordinator's secrets, made at the first start and kept in files that only it may read."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError
from shared.files import write_private
from shared.signing import SigningKey

ADMIN_TOKEN_FILE = "admin-token"  # noqa: S105  # the name of the file, not the token


@dataclass(frozen=True, slots=True)
class Keys:
    """Everything that lets a coordinator be recognised as itself."""

    command: SigningKey  # signs control messages and enrolment replies; join tokens pin it
    model: SigningKey  # signs manifests
    admin_token: str  # what operators show to the API


def load_keys(home: Path) -> Keys:
    """Read the keys of ``home``; the missing ones are made, mode 0600.

    Raises:
        ConfigError: a file holds no key.
    """
    try:
        command = SigningKey.load_or_create(home / "command-key.pem")
        model = SigningKey.load_or_create(home / "model-key.pem")
    except ValueError as error:
        raise ConfigError(
            f"a key file in {home} cannot be read ({error}); put the backup copy back"
        ) from error
    return Keys(command, model, _admin_token(home / ADMIN_TOKEN_FILE))


def _admin_token(path: Path) -> str:
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32).encode() + b"\n")
    return path.read_text(encoding="utf-8").strip()
