"""HTTP requests that prove which device sends them: three headers over method, path, body and time.

Replay within the window is harmless by design: devices only read (manifests, artifacts), and what
they write travels as messages that are deduplicated by id.
"""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime, timedelta

from shared.errors import PeerError
from shared.signing import SigningKey, VerifyingKey

DEVICE_HEADER = "shoal-device"
TIME_HEADER = "shoal-time"
SIGNATURE_HEADER = "shoal-signature"
WINDOW = timedelta(minutes=5)  # how far apart the two clocks may be


def signed_headers(
    *, method: str, path: str, body: bytes, device: str, key: SigningKey, now: datetime
) -> dict[str, str]:
    """Return the headers for one request; ``path`` includes the query, ``now`` is aware UTC."""
    time = now.isoformat()
    signature = key.sign(_content(method, path, body, device, time))
    return {
        DEVICE_HEADER: device,
        TIME_HEADER: time,
        SIGNATURE_HEADER: b64encode(signature).decode(),
    }


def verify_request(
    *,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    key: VerifyingKey,
    now: datetime,
) -> None:
    """Raise PeerError unless ``key`` signed this very request within `WINDOW` of ``now``."""
    try:
        device, time = headers[DEVICE_HEADER], headers[TIME_HEADER]
        signature = b64decode(headers[SIGNATURE_HEADER], validate=True)
        sent_at = datetime.fromisoformat(time)
        too_old = abs(now - sent_at) > WINDOW
    except (KeyError, ValueError, TypeError) as error:
        raise PeerError("request carries no complete device signature") from error
    if too_old:
        raise PeerError(
            f"request was signed at {time}, more than {WINDOW} from the coordinator's clock; "
            "set the device's clock"
        )
    key.verify(signature, _content(method, path, body, device, time))


def _content(method: str, path: str, body: bytes, device: str, time: str) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return f"shoal request v1\n{method.upper()}\n{path}\n{digest}\n{device}\n{time}".encode()
