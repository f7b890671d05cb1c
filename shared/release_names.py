"""Under which names TUF lists the files of a model version, and where its metadata lie.

Coordinator and devices must agree on them: a device asks for ``released/…`` only, and since each
delegated role may list its own folder alone, a name says who vouches for the file.
"""

from typing import Literal

Role = Literal["candidates", "released"]

METADATA_PREFIX = "/v1/tuf/"
MAX_ROLE_BYTES = 1024 * 1024  # of one metadata file; some 4,000 listed files
MAX_ROOT_ROTATIONS = 64  # that a device follows in one refresh


def manifest_target(role: Role, version: str) -> str:
    """Return under which name a version's sealed manifest is listed."""
    return f"{role}/{version}.json"


def artifact_target(role: Role, sha256: str) -> str:
    """Return under which name a model file is listed."""
    return f"{role}/{sha256}.onnx"
