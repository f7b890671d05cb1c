"""The keys behind the TUF roles: one each, made at the first start, 0600 in a folder of their own.

A key of any role but root may be replaced by moving its file away: the next start makes another,
and the root, or the targets role, names it from then on. Root's own key is what devices pin.
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
    "the root of what devices believe about models lies beside the coordinator, so it protects "
    "them against whoever stands between or copies one key, not against who owns the coordinator"
)


@dataclass(frozen=True, slots=True)
class TrustKeys:
    """One key for each role."""

    by_role: Mapping[AnyRole, SigningKey] = field(repr=False)

    @property
    def top(self) -> dict[TopRole, VerifyingKey]:
        """The public keys that a root names."""
        return {role: self.by_role[role].public for role in TOP_ROLES}

    @property
    def delegated(self) -> dict[Role, VerifyingKey]:
        """The public keys that the top targets delegate to."""
        return {role: self.by_role[role].public for role in DELEGATED}


def load_trust_keys(folder: Path) -> TrustKeys:
    """Read the keys of ``folder``; missing ones are made.

    Raises:
        ConfigError: a file holds something else.
    """
    make_folder(folder)
    try:
        keys = {role: SigningKey.load_or_create(folder / f"{role}.pem") for role in ROLES}
    except ValueError as error:
        raise ConfigError(
            f"a key file in {folder} cannot be read ({error}); put the backup copy back"
        ) from error
    return TrustKeys(keys)
