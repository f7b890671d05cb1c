"""The server's ASGI app. Inference is raw ASGI: a framework costs more than a small model does.

Measured for a small CNN: routing and validation by a web framework take two to three times the CPU
of everything else together. All other paths go to `pages`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from edge_agent.inference import protocol
from edge_agent.inference.answering import Answering
from edge_agent.inference.metrics import Metrics
from edge_agent.inference.pages import build_pages
from edge_agent.inference.protocol import InferRequest, RequestError
from shared.errors import UnfitModelError

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_HELD_BYTES = 4 * MAX_BODY_BYTES  # of all requests that are being received or answered
BODY_TIMEOUT_S = 60.0
_INLINE_BYTES = 256 * 1024  # larger bodies are parsed in a thread, so that health stays quick
_Take = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What goes back to the client."""

    status: int
    body: bytes
    json_length: int | None = None  # of the body before compression; None: it is JSON throughout
    encoding: str = ""  # of the body
    number: int | None = None  # for feedback


class InferenceApp:
    """Routes requests, reads their bodies within limits, and answers."""

    def __init__(
        self, answering: Answering, metrics: Metrics, *, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self._answering, self._metrics = answering, metrics
        self._pages: ASGIApp = build_pages(answering, metrics)
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
            answer = _Answer(error.status, protocol.render_error(str(error)))
        except UnfitModelError as error:
            answer = _Answer(500, protocol.render_error(str(error)))
        if answer is not None:
            await _send(send, answer)
            self._metrics.answered(answer.status, time.perf_counter() - started)

    async def _infer(
        self, model: str, version: str | None, headers: dict[bytes, str], receive: Receive
    ) -> _Answer | None:
        with self._memory.share() as take:
            body = await self._receive(receive, headers, take)
            if body is None:
                return None
            request = await self._parse(body, headers, take)
            answer = await self._run(model, version, request)
            return await _packed(answer, headers.get(b"accept-encoding", ""))

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
        answer = await self._answering.infer(model, version, request)
        manifest = answer.served.manifest
        body, json_length = protocol.render(
            request,
            model=manifest.model,
            version=answer.served.version,
            outputs=manifest.outputs,
            results=answer.results,
        )
        return _Answer(200, body, json_length, number=answer.number)


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


async def _packed(answer: _Answer, accepted: str) -> _Answer:
    if not accepted:
        return answer
    if len(answer.body) < _INLINE_BYTES:
        body, encoding = protocol.compress(answer.body, accepted)
    else:
        body, encoding = await asyncio.to_thread(protocol.compress, answer.body, accepted)
    return replace(answer, body=body, encoding=encoding)


async def _send(send: Send, answer: _Answer) -> None:
    headers: list[tuple[bytes, bytes]] = [(b"content-length", str(len(answer.body)).encode())]
    if answer.number is not None:
        headers.append((protocol.ANSWER_HEADER.lower().encode(), str(answer.number).encode()))
    if answer.encoding:
        headers.append((b"content-encoding", answer.encoding.encode()))
    if answer.json_length is None:
        headers.append((b"content-type", b"application/json"))
    else:
        headers.append((b"content-type", b"application/octet-stream"))
        name = protocol.JSON_LENGTH_HEADER.lower().encode()
        headers.append((name, str(answer.json_length).encode()))
    start: dict[str, Any] = {"type": "http.response.start", "status": answer.status}
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
