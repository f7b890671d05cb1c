"""The keys behind the TUF roles: one each, made at the first start, 0600 in a folder of their own.

A key of any role but root may be replaced by moving its file away: the next start makes another,
and the root, or the targets role, names it from then on. Root's own key is what devices pin. Its
file may be kept elsewhere; it is needed for the starts at which the root has something new to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloud_coordinator.trust.metadata import DELEGATED, ROLES, TOP_ROLES, AnyRole, TopRole
from shared.errors import ConfigError
from shared.files import make_folder
from shared.release_names import Role
from shared.signing import SigningKey, VerifyingKey

ROOT_KEY_FILE = "root.pem"
ROOT_KEY_BESIDE = (
    "the root of what devices believe about models lies beside the coordinator, so whoever owns "
    "the coordinator owns it for good; move this file to another machine, and bring it back for "
    "the starts that ask for it"
)


@dataclass(frozen=True, slots=True)
class TrustKeys:
    """One key for each role; that of root may be away."""

    by_role: Mapping[AnyRole, SigningKey] = field(repr=False)

    @property
    def root_is_here(self) -> bool:
        """Whether a root can be signed."""
        return "root" in self.by_role

    @property
    def top(self) -> dict[TopRole, VerifyingKey]:
        """The public keys that a root names, as far as they are here."""
        return {role: self.by_role[role].public for role in TOP_ROLES if role in self.by_role}

    @property
    def delegated(self) -> dict[Role, VerifyingKey]:
        """The public keys that the top targets delegate to."""
        return {role: self.by_role[role].public for role in DELEGATED}


def load_trust_keys(folder: Path) -> TrustKeys:
    """Read the keys of ``folder``; missing ones are made, that of root only with the first.

    Raises:
        ConfigError: a file holds something else.
    """
    make_folder(folder)
    try:
        away = any(folder.glob("*.pem")) and not (folder / ROOT_KEY_FILE).exists()
        keys = {
            role: SigningKey.load_or_create(folder / f"{role}.pem")
            for role in ROLES
            if role != "root" or not away
        }
    except ValueError as error:
        raise ConfigError(
            f"a key file in {folder} cannot be read ({error}); put the backup copy back"
        ) from error
    return TrustKeys(keys)
