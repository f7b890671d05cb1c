"""Who sends a Fleet request: Flower's signed headers, checked before a byte of the body is read.

A node signs a timestamp, not the request, and may send the same signature for as long as Flower
accepts its timestamp. So each verified (key, timestamp, signature) is remembered for that window,
which spares the elliptic curve on all but one request a minute; whether the key is registered is
asked anew each time, so that unregistering takes effect at once.
"""

import binascii
from base64 import b64decode
from collections.abc import Callable, Mapping
from datetime import datetime

from fastapi import HTTPException
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

_REFUSED = "Invalid SuperNode authentication"  # as Flower words it
_MAX_REMEMBERED = 4096


class NodeAuthenticator:
    """Verifies signatures, and remembers those of registered keys."""

    def __init__(
        self, node_id_of: Callable[[bytes], int | None], clock: Callable[[], datetime]
    ) -> None:
        self._node_id_of = node_id_of
        self._clock = clock
        self._signed_at: dict[tuple[str, str, str], datetime] = {}

    def authenticate(self, headers: Mapping[str, str]) -> tuple[bytes, int | None]:
        """Return the sender's public key (PEM) and its node id, None if it is not registered.

        Raises:
            HTTPException: 401, as Flower answers where the signature is missing, wrong or stale.
        """
        try:
            triple = (
                headers[FLEET_HTTP_PUBLIC_KEY_HEADER],
                headers[TIMESTAMP_HEADER],
                headers[FLEET_HTTP_SIGNATURE_HEADER],
            )
            public_key = b64decode(triple[0], validate=True)
            signed_at = self._signed_at.get(triple) or _verified(public_key, triple)
            fresh = self._is_fresh(signed_at)
        except (KeyError, ValueError, TypeError, AttributeError, binascii.Error) as error:
            raise refused() from error
        if not fresh:
            self._signed_at.pop(triple, None)
            raise refused()
        node_id = self._node_id_of(public_key)
        if node_id is not None:
            self._remember(triple, signed_at)
        return public_key, node_id

    def _is_fresh(self, signed_at: datetime) -> bool:
        age_s = (self._clock() - signed_at).total_seconds()
        return -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE

    def _remember(self, triple: tuple[str, str, str], signed_at: datetime) -> None:
        if len(self._signed_at) >= _MAX_REMEMBERED and triple not in self._signed_at:
            self._signed_at = {t: at for t, at in self._signed_at.items() if self._is_fresh(at)}
            if len(self._signed_at) >= _MAX_REMEMBERED:
                self._signed_at.clear()
        self._signed_at[triple] = signed_at


def refused() -> HTTPException:
    """Return the 401 that Flower answers to every failed node authentication."""
    return HTTPException(status_code=401, detail=_REFUSED)


def _verified(public_key: bytes, triple: tuple[str, str, str]) -> datetime:
    """Return when the signature was made; raise ValueError where it is not the key's."""
    _, timestamp, signature = triple
    signed_at = datetime.fromisoformat(timestamp)
    if signed_at.tzinfo is None:
        raise ValueError("timestamp without a zone")
    key = bytes_to_public_key(public_key)
    if not verify_signature(key, timestamp.encode("ascii"), b64decode(signature, validate=True)):
        raise ValueError("signature does not match")
    return signed_at
