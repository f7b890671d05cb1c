"""Who calls the API: a device by its signature, or the operator by the admin token.

Both are FastAPI dependencies; `app.py` puts what they need into ``app.state``: ``devices`` (a
`KnowsDevices`), ``admin_token`` and ``clock``.
"""

import asyncio
import hmac
from collections.abc import Callable
from datetime import datetime
from typing import Protocol, cast

from fastapi import Request

from shared.errors import NotFoundError, PeerError, UnauthorizedError
from shared.request_signing import DEVICE_HEADER, verify_request
from shared.signing import VerifyingKey

MAX_BODY_BYTES = 1024 * 1024
_BODY_DEADLINE_S = 30.0


class KnowsDevices(Protocol):
    """Whoever knows the identity keys of enrolled devices."""

    async def identity_key(self, device_id: str) -> VerifyingKey:
        """Return the device's key; raise NotFoundError for an unknown device."""
        ...


async def authenticated_device(request: Request) -> str:
    """Return the id of the enrolled device that signed this very request.

    Raises:
        UnauthorizedError: unknown device, no signature, a wrong one, or one of another time.
    """
    devices = cast("KnowsDevices", request.app.state.devices)
    clock = cast("Callable[[], datetime]", request.app.state.clock)
    device = request.headers.get(DEVICE_HEADER, "")
    try:
        verify_request(
            method=request.method,
            path=_signed_path(request),
            body=await read_body(request),
            headers=request.headers,
            key=await devices.identity_key(device),
            now=clock(),
        )
    except NotFoundError as error:
        raise UnauthorizedError("request is not signed by an enrolled device") from error
    except PeerError as error:
        raise UnauthorizedError(str(error)) from error
    return device


async def require_admin(request: Request) -> None:
    """Let pass whoever bears the admin token.

    Raises:
        UnauthorizedError: it is missing or wrong.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    expected = cast("str", request.app.state.admin_token)
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), expected.encode()):
        raise UnauthorizedError(
            "this needs the admin token; it lies in the file admin-token of the coordinator's home"
        )


async def device_or_admin(request: Request) -> None:
    """Let pass an enrolled device by its signature, or the operator by the admin token."""
    if DEVICE_HEADER in request.headers:
        await authenticated_device(request)
    else:
        await require_admin(request)


async def read_body(request: Request, *, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return the request's body; raise PeerError when it is over ``limit_bytes``, or too slow."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(_BODY_DEADLINE_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit_bytes:
                    raise PeerError(f"request body is over {limit_bytes} bytes")
                chunks.append(chunk)
    except TimeoutError as error:
        raise PeerError(f"request body took more than {_BODY_DEADLINE_S:.0f} s") from error
    return b"".join(chunks)


def _signed_path(request: Request) -> str:
    path = cast("bytes", request.scope["raw_path"]).decode("latin-1")
    query = cast("bytes", request.scope["query_string"]).decode("latin-1")
    return f"{path}?{query}" if query else path
