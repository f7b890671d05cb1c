"""The server's ASGI app. Inference is raw ASGI: a framework costs more than a small model does.

Measured for a small CNN: routing and validation by a web framework take two to three times the CPU
of everything else together. All other paths go to `pages`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote

import numpy as np
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_agent.inference import protocol
from edge_agent.inference.engine import Array
from edge_agent.inference.live import LiveModel
from edge_agent.inference.metrics import Metrics
from edge_agent.inference.pages import build_pages, served_as, unknown_model
from edge_agent.inference.protocol import InferRequest, RequestError
from shared.errors import UnfitModelError

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_HELD_BYTES = 4 * MAX_BODY_BYTES  # of all requests that are being received or answered
BODY_TIMEOUT_S = 60.0
_INLINE_BYTES = 256 * 1024  # larger bodies are parsed in a thread, so that health stays quick
_Take = Callable[[int], None]
_Answer = tuple[int, bytes, int | None]  # status, body, length of its JSON before binary tensors


class InferenceApp:
    """Routes requests, reads their bodies within limits, and answers."""

    def __init__(
        self, live: LiveModel, metrics: Metrics, *, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self._live, self._metrics = live, metrics
        self._pages: ASGIApp = build_pages(live, metrics)
        self._max_body_bytes = max_body_bytes
        self._memory = _Memory(MAX_HELD_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        target = _inference_target(scope)
        if target is None:
            await self._pages(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            answer = await self._infer(*target, headers, receive)
        except RequestError as error:
            answer = error.status, protocol.render_error(str(error)), None
        except UnfitModelError as error:
            answer = 500, protocol.render_error(str(error)), None
        if answer is not None:
            await _send(send, answer)
            self._metrics.answered(answer[0], time.perf_counter() - started)

    async def _infer(
        self, model: str, version: str | None, headers: dict[bytes, str], receive: Receive
    ) -> _Answer | None:
        with self._memory.share() as take:
            body = await self._receive(receive, headers, take)
            if body is None:
                return None
            request = await self._parse(body, headers, take)
            return await self._run(model, version, request)

    async def _receive(
        self, receive: Receive, headers: dict[bytes, str], take: _Take
    ) -> bytes | None:
        """Return the whole body; None when the client hung up."""
        if int(headers.get(b"content-length", "0")) > self._max_body_bytes:
            raise protocol.too_large(self._max_body_bytes)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while (event := await receive())["type"] == "http.request":
                    chunk: bytes = event.get("body", b"")
                    take(len(chunk))
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise protocol.too_large(self._max_body_bytes)
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise RequestError(
                f"the body did not arrive within {BODY_TIMEOUT_S:.0f} seconds", status=408
            ) from error
        return None

    async def _parse(self, body: bytes, headers: dict[bytes, str], take: _Take) -> InferRequest:
        json_length = headers.get(protocol.JSON_LENGTH_HEADER.lower().encode())
        if encoding := headers.get(b"content-encoding", "").strip().lower():
            packed = len(body)
            body = await asyncio.to_thread(
                protocol.decompress, body, encoding, limit_bytes=self._max_body_bytes
            )
            take(len(body) - packed)
        take(protocol.JSON_WEIGHT * protocol.length_of_json(body, json_length))
        if len(body) < _INLINE_BYTES:
            return protocol.parse(body, json_length)
        return await asyncio.to_thread(protocol.parse, body, json_length)

    async def _run(self, model: str, version: str | None, request: InferRequest) -> _Answer:
        # No await between reading what is served and queueing there: a swap drains the queue.
        served = served_as(self._live, model, version)
        if served is None:
            raise RequestError(unknown_model(self._live, model, version), status=404)
        manifest = served.manifest
        feeds = protocol.match(request, manifest.inputs, manifest.outputs)
        results = await served.infer(feeds)
        if not _all_finite(results) and _all_finite(feeds.values()):
            raise UnfitModelError("the model answered with NaN or infinity")
        body, json_length = protocol.render(
            request,
            model=manifest.model,
            version=served.version,
            outputs=manifest.outputs,
            results=results,
        )
        return 200, body, json_length


class _Memory:
    """What all requests together may hold, so that many large ones cannot exhaust the device."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[_Take]:
        """Yield a function that takes bytes for one request; all are given back at the end."""
        taken = 0

        def take(size_bytes: int) -> None:
            nonlocal taken
            taken += size_bytes
            self._held_bytes += size_bytes
            if self._held_bytes > self._limit_bytes:
                raise RequestError("too many large requests at once; try again", status=503)

        try:
            yield take
        finally:
            self._held_bytes -= taken


def _inference_target(scope: Scope) -> tuple[str, str | None] | None:
    """Return model and version of ``POST /v2/models/M[/versions/V]/infer``; None for the rest."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    raw: Iterable[str] = scope["raw_path"].decode("latin-1").split("/")
    match [unquote(part) for part in raw]:
        case ["", "v2", "models", model, "infer"]:
            return model, None
        case ["", "v2", "models", model, "versions", version, "infer"]:
            return model, version
    return None


def _all_finite(arrays: Iterable[Array]) -> bool:
    return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in arrays)


async def _send(send: Send, answer: _Answer) -> None:
    status, body, json_length = answer
    headers: list[tuple[bytes, bytes]] = [(b"content-length", str(len(body)).encode())]
    if json_length is None:
        headers.append((b"content-type", b"application/json"))
    else:
        headers.append((b"content-type", b"application/octet-stream"))
        name = protocol.JSON_LENGTH_HEADER.lower().encode()
        headers.append((name, str(json_length).encode()))
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
