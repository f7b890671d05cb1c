"""How a task is named in plans, invitations and data registrations; free of torch.

A spec is configuration, never code: ``uses`` names something that is *installed* where it is
needed, either an entry point of the group ``shoal.tasks`` or ``module:object``.
"""

import hashlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task as a person writes it; two specs with the same digest are the same task."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    uses: Annotated[str, Meta(max_length=200)]
    options: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the deterministic JSON of the whole spec."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()
