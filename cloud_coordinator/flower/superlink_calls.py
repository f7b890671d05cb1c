"""How a run worker talks to the SuperLink: patiently, and without Flower's habit of SIGINT."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpx
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClient, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

from cloud_coordinator.flower.superlink_messages import CONTROL_SECRET_HEADER
from shared.errors import UnavailableError
from shared.framing import Batches, Frames
from shared.http_retries import retry_while_away

logger = logging.getLogger(__name__)
Request = TypeVar("Request")
Response = TypeVar("Response")
_HEARTBEAT_S = 10.0  # Flower ends the run 60 s after the last one


class Caller:
    """Calls the SuperLink, waits out short absences and tells when the run is lost."""

    def __init__(self, patience_s: float) -> None:
        self.stop = threading.Event()
        self._patience_s = patience_s
        self._lost = False
        self._rng = random.Random()  # noqa: S311  # spreads retries, guards nothing

    def call(self, method: Callable[[Request], Response], request: Request) -> Response:
        """Call once the SuperLink answers; raise UnavailableError when it does not, or says no."""
        if self._lost:
            raise void_run()
        try:
            return retry_while_away(
                lambda: method(request),
                what="the SuperLink",
                deadline=time.monotonic() + self._patience_s,
                stop=self.stop,
                rng=self._rng,
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code in {401, 403}:
                raise void_run() from error
            raise UnavailableError(
                f"the SuperLink cannot serve this run ({error.response.status_code} "
                f"{error.response.text[:200]}); see superlink.log"
            ) from error

    def beat(self, runtime: RuntimeHttpClient) -> None:
        """Send heartbeats until stopped; what a lost run means is told to the next caller."""
        while not self.stop.wait(_HEARTBEAT_S):
            try:
                if not self.call(runtime.SendTaskHeartbeat, SendTaskHeartbeatRequest()).success:
                    raise void_run()
            except UnavailableError as error:
                if not self.stop.is_set():
                    logger.warning("heartbeat failed: %s", error)
                    self._lost = True
                return


class _OwnConnections(ProtobufClient):
    """Keeps idle connections for as long as a round's pauses, and goes through no proxy."""

    def __init__(self, *args: Any, verify: Any = True, **options: Any) -> None:
        super().__init__(*args, verify=verify, **options)
        self._client.close()
        self._client = httpx.Client(
            verify=verify,
            timeout=30.0,
            limits=httpx.Limits(keepalive_expiry=60.0),
            trust_env=False,
        )


class ControlClient(_OwnConnections, ControlHttpClient):
    """Starts and stops runs."""


class RuntimeClient(_OwnConnections, RuntimeHttpClient):
    """Does what a ServerApp's process may, small messages with their objects in one request."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._batches = Batches(self._unary_unary)

    def push_batch(
        self, request: PushAppMessagesRequest, objects: Iterable[PushObjectRequest]
    ) -> PushAppMessagesResponse:
        """Push messages and objects; those that the answer names are still to be pushed."""
        path = "/v1/runtime/push-batch"
        pushed = self._batches.post(path, (request, *objects), PushAppMessagesResponse)
        return self.PushMessages(request) if pushed is None else pushed

    def pull_batch(
        self, request: PullAppMessagesRequest
    ) -> tuple[PullAppMessagesResponse, dict[str, bytes]]:
        """Pull messages, and all objects of those that the SuperLink has confirmed already."""
        frames = self._batches.post("/v1/runtime/pull-batch", (request,), Frames)
        if frames is None:
            return self.PullMessages(request), {}
        first, *others = frames.parts
        objects = map(PushObjectRequest.FromString, others)
        contents = {item.object_id: item.object_content for item in objects}
        return PullAppMessagesResponse.FromString(first), contents


class ControlSecret:
    """Adds the header that the private listener demands on the Control API."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Do as Flower's client asks of an interceptor."""
        context.request.headers[CONTROL_SECRET_HEADER] = self._secret
        return call_next(context)


def void_run() -> UnavailableError:
    """Return what is raised when the run has ended in the SuperLink, or the SuperLink restarted."""
    return UnavailableError(
        "the SuperLink no longer knows this run; start a new session of the run"
    )
