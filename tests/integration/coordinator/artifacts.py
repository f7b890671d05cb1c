"""The files of pretended versions, which devices know without a download."""


def artifact_of(version: str) -> bytes:
    """Return the one file of ``version``."""
    return f"file of {version}".encode()
