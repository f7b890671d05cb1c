"""TUF metadata as values: what each role says, and its signatures.

After the TUF specification 1.0.34, written and read by python-tuf. Pure: which metadata are in
force, and where they are kept, is the repository's business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NoReturn

from securesystemslib.signer import Key as AnyKey
from securesystemslib.signer import SecretsHandler, Signature, Signer, SSlibKey
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from shared.release_names import Role
from shared.signing import SigningKey, VerifyingKey

TopRole = Literal["root", "targets", "snapshot", "timestamp"]
AnyRole = TopRole | Role
TOP_ROLES: tuple[TopRole, ...] = ("root", "targets", "snapshot", "timestamp")
DELEGATED: tuple[Role, ...] = ("candidates", "released")
ROLES: tuple[AnyRole, ...] = (*TOP_ROLES, *DELEGATED)

_WIRE = JSONSerializer(compact=True)


@dataclass(frozen=True, slots=True, order=True)
class ListedFile:
    """One file that a delegated role vouches for."""

    path: str  # begins with the role's name
    length: int  # bytes
    sha256: str


class KeySigner(Signer):
    """Lets a `SigningKey` of ours sign TUF metadata; its private half stays where it is."""

    def __init__(self, key: SigningKey) -> None:
        self._key, self._public = key, tuf_key(key.public)

    @property
    def public_key(self) -> SSlibKey:
        """The key as TUF describes it."""
        return self._public

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: AnyKey, secrets_handler: SecretsHandler | None = None
    ) -> NoReturn:
        """Refuse: our keys are opened by keys.py alone."""
        raise NotImplementedError(f"{cls.__name__} wraps a key that is open already")

    def sign(self, payload: bytes) -> Signature:
        """Return this key's signature over ``payload``."""
        return Signature(self._public.keyid, self._key.sign(payload).hex())


def tuf_key(key: VerifyingKey) -> SSlibKey:
    """Describe a public key; its id is ours, the SHA-256 of its raw bytes."""
    return SSlibKey(key.key_id, "ed25519", "ed25519", {"public": key.raw.hex()})


def root_of(
    keys: Mapping[TopRole, VerifyingKey], *, version: int, expires: datetime
) -> Metadata[Root]:
    """Say which key stands for each of the four top roles."""
    root = Root(version=version, expires=expires, consistent_snapshot=True)
    for role, key in keys.items():
        root.add_key(tuf_key(key), role)
    return Metadata(root)


def targets_of(
    delegated: Mapping[Role, VerifyingKey], *, version: int, expires: datetime
) -> Metadata[Targets]:
    """Delegate one folder to each role; no file is listed at the top."""
    keys: dict[str, AnyKey] = {key.key_id: tuf_key(key) for key in delegated.values()}
    roles: dict[str, DelegatedRole] = {
        role: DelegatedRole(role, [key.key_id], threshold=1, terminating=True, paths=[f"{role}/*"])
        for role, key in delegated.items()
    }
    return Metadata(Targets(version=version, expires=expires, delegations=Delegations(keys, roles)))


def listing_of(
    files: Iterable[ListedFile], *, version: int, expires: datetime
) -> Metadata[Targets]:
    """List the files of one delegated role."""
    targets = {
        file.path: TargetFile(file.length, {"sha256": file.sha256}, file.path) for file in files
    }
    return Metadata(Targets(version=version, expires=expires, targets=targets))


def snapshot_of(
    roles: Mapping[str, tuple[int, bytes]], *, version: int, expires: datetime
) -> Metadata[Snapshot]:
    """Name the version, length and hash of each role's metadata, so that none can be mixed."""
    meta = {
        f"{role}.json": MetaFile.from_data(number, content, ["sha256"])
        for role, (number, content) in roles.items()
    }
    return Metadata(Snapshot(version=version, expires=expires, meta=meta))


def timestamp_of(
    snapshot: tuple[int, bytes], *, version: int, expires: datetime
) -> Metadata[Timestamp]:
    """Name the one snapshot that is in force."""
    meta = MetaFile.from_data(*snapshot, ["sha256"])
    return Metadata(Timestamp(version=version, expires=expires, snapshot_meta=meta))


def sign(metadata: Metadata[Any], key: SigningKey) -> bytes:
    """Add the signature of ``key`` and serialise; what others signed before stays."""
    metadata.sign(KeySigner(key), append=True)
    return metadata.to_bytes(_WIRE)


def signed_by(content: bytes) -> frozenset[str]:
    """Return the ids of the keys whose signatures metadata of ours carry."""
    return frozenset(Metadata[Any].from_bytes(content).signatures)


def keys_of_root(content: bytes) -> dict[str, tuple[str, ...]]:
    """Return the key ids that a root names for each top role."""
    root = Metadata[Root].from_bytes(content).signed
    return {name: tuple(role.keyids) for name, role in root.roles.items()}


def keys_of_targets(content: bytes) -> dict[str, tuple[str, ...]]:
    """Return the key ids that the top targets delegate each folder to."""
    delegations = Metadata[Targets].from_bytes(content).signed.delegations
    roles = delegations.roles if delegations and delegations.roles else {}
    return {name: tuple(role.keyids) for name, role in roles.items()}
