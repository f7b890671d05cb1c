"""The trainer's door to Flower: the SuperNode role, played inside the trainer's own process.

A stock SuperNode asks every three seconds and starts a process for each message; this one asks when
the daemon was nudged and runs the ClientApp where it is, warm. It runs the one app that is
installed with Shoal and only for the task that its owner agreed to: what a run's bundle contains
is never installed or executed, only its names are compared and its configuration read.
"""

import logging
import random
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.config import get_fab_config, get_fused_config_from_fab
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from edge_agent.eligibility import agree
from shared.errors import DataError, ShoalError, UnavailableError
from shared.framing import Batches, Frames, small_contents
from shared.http_retries import retry_while_away
from shared.tasks.spec import TaskSpec

logger = logging.getLogger(__name__)
Request = TypeVar("Request")
Response = TypeVar("Response")
App = Callable[[Message, Context], Message]
_Pulled = tuple[PullMessagesResponse, dict[str, bytes]]  # a message, and objects by their ids
CLIENT_APP = "edge_agent.training_app:app"
_HEARTBEAT_INTERVAL_S = 30.0  # the SuperLink counts a node out after two of them
_SIGNATURE_LIFETIME_S = 60.0  # Flower accepts 300
_KEEP_ALIVE_S = 60.0
_LEAVE_PATIENCE_S = 2.0
_OBJECT_POLL_S = 0.1
_UPLOAD_PAUSE_S = 0.5  # before an upload begins anew


class FlowerNode:
    """One device as Flower sees it. `join`, then `work` whenever a message may wait, then leave."""

    def __init__(
        self,
        *,
        address: str,
        ca_pem: str,
        private_key: EllipticCurvePrivateKey,
        app: App,
        task: TaskSpec,
        node_config: Mapping[str, Any],
        client_app: str = CLIENT_APP,
        announce: Callable[[str], None] = lambda _: None,
        patience_s: float = 20.0,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            address: host:port of the Fleet API.
            ca_pem: the CA that enrolment pinned.
            private_key: the node key that enrolment registered.
            app: a ``ClientApp``, called in the thread of `work`.
            task: the only task that messages may be about.
            node_config: what the app sees as ``context.node_config``.
            client_app: the name that runs must give for ``app``.
            announce: told in words what is done next.
            patience_s: how long a SuperLink that does not answer is waited for.
        """
        self._public_key = public_key_to_bytes(private_key.public_key())
        self._client = _FleetClient.from_server_address(
            address,
            insecure=False,
            root_certificates=ca_pem.encode(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                _CachedSignature(private_key),
            ],
        )
        self._app = app
        self._task = task
        self._client_app = client_app
        self._announce = announce
        self._node_config = dict(node_config)
        self._patience_s = patience_s
        self._rng = random.Random()  # noqa: S311  # spreads retries, guards nothing
        self._stop = threading.Event()
        self._joining = threading.Lock()
        self._node = Node()
        self._runs: dict[int, Context | _RefusedRun] = {}
        self._heart = threading.Thread(target=self._beat, name="node-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @property
    def node_id(self) -> int:
        """Flower's handle for this device in this life of the SuperLink."""
        return self._node.node_id

    def join(self) -> None:
        """Activate at the SuperLink and keep the heartbeat from now on.

        Raises:
            UnavailableError: it is away, or does not let this device's node key in.
        """
        self._activate()
        self._heart.start()

    def work(self) -> Iterator[str]:
        """Answer messages until none waits; yield each one's id once its reply is in whole.

        Raises:
            UnavailableError: the SuperLink is away or lets this device in no more.
        """
        while not self._stop.is_set() and (pulled := self._pull())[0].messages_list:
            message_id = self._answer(*pulled)
            if message_id is not None:
                yield message_id

    def leave(self, *, tell: bool = True) -> None:
        """Close all connections; before, deactivate if the SuperLink is there to be told.

        Args:
            tell: False where that SuperLink's life is over anyway.
        """
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join(_LEAVE_PATIENCE_S)
        if self._node.node_id and tell:
            request = DeactivateNodeRequest(node_id=self._node.node_id)
            try:
                self._call(self._client.DeactivateNode, request, patience_s=0)
            except (UnavailableError, httpx.HTTPStatusError) as error:
                logger.info("left without deactivation: %s", error)
        self._client.close()

    def _call(
        self,
        method: Callable[[Request], Response],
        request: Request,
        *,
        patience_s: float | None = None,
    ) -> Response:
        patience_s = self._patience_s if patience_s is None else patience_s
        return retry_while_away(
            lambda: method(request),
            what="the SuperLink",
            deadline=time.monotonic() + patience_s,
            stop=self._stop,
            rng=self._rng,
        )

    def _activate(self) -> None:
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=_HEARTBEAT_INTERVAL_S
        )
        with self._joining:
            try:
                node_id = self._call(self._client.ActivateNode, request).node_id
            except httpx.HTTPStatusError as error:
                raise UnavailableError(
                    "the SuperLink does not let this device in "
                    f"({error.response.status_code} {error.response.text[:200]}); "
                    "check that it is enrolled and that its clock is right"
                ) from error
            self._node = Node(node_id=node_id)

    def _beat(self) -> None:
        """Send heartbeats; where the SuperLink has forgotten the node, activate it again."""
        while not self._stop.wait(_HEARTBEAT_INTERVAL_S / 2 * self._rng.uniform(0.8, 1.0)):
            request = SendNodeHeartbeatRequest(
                node=self._node, heartbeat_interval=_HEARTBEAT_INTERVAL_S
            )
            try:
                try:
                    known = self._call(self._client.SendNodeHeartbeat, request).success
                except httpx.HTTPStatusError:
                    known = False
                if not known:
                    self._activate()
            except UnavailableError as error:
                logger.warning("heartbeat failed: %s", error)
            except Exception:  # a node without a heart is counted out, and nobody would see why
                logger.exception("heartbeat failed")

    def _pull(self) -> _Pulled:
        """Ask for one message; once anew after activation where the SuperLink forgot the node."""
        try:
            return self._call(self._client.pull_batch, PullMessagesRequest(node=self._node))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.UNAUTHORIZED:
                raise _broken(error) from error
        self._activate()
        try:
            return self._call(self._client.pull_batch, PullMessagesRequest(node=self._node))
        except httpx.HTTPStatusError as error:
            raise _broken(error) from error

    def _answer(self, pulled: PullMessagesResponse, inline: Mapping[str, bytes]) -> str | None:
        """Run the app on the pulled message and send the reply; None if the message is void."""
        try:
            message = self._fetch(pulled, inline)
            started = time.monotonic()
            reply = self._run(message)
            return self._send(message, reply, time.monotonic() - started)
        except httpx.HTTPStatusError as error:
            logger.warning("message dropped: %s", _broken(error))
        except _MessageLostError as error:
            logger.warning("message dropped: %s", error)
        return None

    def _fetch(self, pulled: PullMessagesResponse, inline: Mapping[str, bytes]) -> Message:
        """Download the content that has not come with the pull, as the metadata has."""
        metadata = message_from_proto(pulled.messages_list[0]).metadata
        tree = pulled.message_object_trees[0]
        metadata.__dict__["_message_id"] = tree.object_id
        (content_tree,) = tree.children
        contents = {
            part.object_id: inline.get(part.object_id)
            or self._pull_object(metadata.run_id, part.object_id, metadata.ttl)
            for part in iterate_object_tree(content_tree)
        }
        content = inflate_object_from_contents(content_tree.object_id, contents)
        assert isinstance(content, RecordDict)
        if tree.object_id not in inline:
            confirm = ConfirmMessageReceivedRequest(
                node=self._node, run_id=metadata.run_id, message_object_id=tree.object_id
            )
            self._call(self._client.ConfirmMessageReceived, confirm)
        return make_message(metadata=metadata, content=content)

    def _pull_object(self, run_id: int, object_id: str, patience_s: float) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        deadline = time.monotonic() + patience_s
        while True:
            pulled = self._call(self._client.PullObject, request)
            if pulled.object_available:
                return bytes(pulled.object_content)
            overdue = time.monotonic() > deadline
            if not pulled.object_found or overdue or self._stop.wait(_OBJECT_POLL_S):
                raise _MessageLostError("its content did not arrive")

    def _run(self, message: Message) -> Message:
        """Call the app; whatever goes wrong becomes an error reply that quotes no local data."""
        context = self._context(message.metadata.run_id)
        if isinstance(context, _RefusedRun):
            return Message(Error(ErrorCode.INVALID_FAB, context.cause), reply_to=message)
        metadata = message.metadata
        self._announce(f"{metadata.message_type}, round {metadata.group_id}")
        try:
            return self._app(message, context)
        except ShoalError as error:
            cause = str(error)
        except Exception as error:  # the app is the task author's code; the node outlives it
            logger.exception("the client app failed")
            cause = f"{type(error).__name__} in the client app; see the trainer's log on the device"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, cause), reply_to=message)

    def _context(self, run_id: int) -> "Context | _RefusedRun":
        """Return what the app keeps during a run, asked from the SuperLink once."""
        if run_id not in self._runs:
            self._runs[run_id] = self._meet_run(run_id)
        return self._runs[run_id]

    def _meet_run(self, run_id: int) -> "Context | _RefusedRun":
        request = GetRunRequest(node=self._node, run_id=run_id)
        run = run_from_proto(self._call(self._client.GetRun, request).run)
        bundle = self._call(
            self._client.GetFab,
            GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id),
        ).fab.content
        try:
            components = get_fab_config(bundle)["tool"]["flwr"]["app"]["components"]
            config = get_fused_config_from_fab(bundle, run)
            agree(self._task, self._client_app, components=components, run_config=config)
        except (DataError, ValueError, KeyError) as error:
            logger.warning("run %d refused: %s", run_id, error)
            return _RefusedRun(str(error))
        return Context(
            run_id=run_id,
            node_id=self._node.node_id,
            node_config=self._node_config,
            state=RecordDict(),
            run_config=config,
            series_id=run.series_id,
        )

    def _send(self, message: Message, reply: Message, seconds: float) -> str:
        """Upload the reply and all its objects, trying until the message's time to live is over."""
        run_id, deadline = message.metadata.run_id, time.monotonic() + reply.metadata.ttl
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            push = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            objects = get_all_nested_objects(reply)
            while not self._push(run_id, push, objects, deadline):
                if time.monotonic() > deadline or self._stop.wait(_UPLOAD_PAUSE_S):
                    raise _MessageLostError("it could not be answered in time")
        return message.metadata.message_id

    def _push(
        self,
        run_id: int,
        push: PushMessagesRequest,
        objects: Mapping[str, Any],
        deadline: float,
    ) -> bool:
        """Begin a push session and upload what it asks for; False where it must begin anew."""
        inline = [
            PushObjectRequest(node=self._node, object_id=object_id, object_content=content)
            for object_id, content in small_contents([objects]).items()
        ]
        pushed = self._call(
            lambda request: self._client.push_batch(request, inline),
            push,
            patience_s=deadline - time.monotonic(),
        )
        return all(
            self._push_object(run_id, pushed.session_id, object_id, objects, deadline)
            for object_id in pushed.objects_to_push
        )

    def _push_object(
        self,
        run_id: int,
        session_id: str,
        object_id: str,
        objects: Mapping[str, Any],
        deadline: float,
    ) -> bool:
        """Upload one object; False where the push session is over."""
        request = PushObjectRequest(
            node=self._node,
            run_id=run_id,
            object_id=object_id,
            object_content=objects[object_id].deflate(),
            session_id=session_id,
        )
        left_s = deadline - time.monotonic()
        return bool(self._call(self._client.PushObject, request, patience_s=left_s).stored)


class _MessageLostError(Exception):
    """A message cannot be answered any more; the next one may."""


class _RefusedRun(msgspec.Struct, frozen=True):
    """A run that this device does not serve, and why."""

    cause: str


def load_node_key(path: Path) -> EllipticCurvePrivateKey:
    """Read the node key that enrolment made, in the OpenSSH form that Flower itself reads.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"cannot read the node key {path}; enrol this device again") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise DataError(f"{path} holds no elliptic curve key; enrol this device again")
    return key


class _CachedSignature:
    """Adds Flower's signed headers, signed anew once a minute instead of for each request."""

    def __init__(self, private_key: EllipticCurvePrivateKey) -> None:
        self._private_key = private_key
        self._public_key = b64encode(public_key_to_bytes(private_key.public_key())).decode()
        self._renew_at = 0.0
        self._headers: dict[str, str] = {}

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        if time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + _SIGNATURE_LIFETIME_S
            self._headers = self._sign()
        context.request.headers.update(self._headers)
        return call_next(context)

    def _sign(self) -> dict[str, str]:
        timestamp = now().isoformat()
        signature = sign_message(self._private_key, timestamp.encode())
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: self._public_key,
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        }


class _FleetClient(FleetHttpClient):
    """Sends small messages in batches, and keeps idle connections for a round's pauses."""

    def __init__(self, *args: Any, verify: Any = True, **options: Any) -> None:
        super().__init__(*args, verify=verify, **options)
        self._client.close()
        self._client = httpx.Client(
            verify=verify,
            timeout=30.0,
            limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=False,
        )
        self._batches = Batches(self._unary_unary)

    def push_batch(
        self, request: PushMessagesRequest, objects: Iterable[PushObjectRequest]
    ) -> PushMessagesResponse:
        """Push a message and objects; those that the answer names are still to be pushed."""
        path = "/v1/fleet/push-batch"
        pushed = self._batches.post(path, (request, *objects), PushMessagesResponse)
        return self.PushMessages(request) if pushed is None else pushed

    def pull_batch(self, request: PullMessagesRequest) -> _Pulled:
        """Pull a message; where its own object is there, all are, and it is confirmed."""
        frames = self._batches.post("/v1/fleet/pull-batch", (request,), Frames)
        if frames is None:
            return self.PullMessages(request), {}
        first, *others = frames.parts
        objects = map(PushObjectRequest.FromString, others)
        contents = {item.object_id: item.object_content for item in objects}
        return PullMessagesResponse.FromString(first), contents


def _broken(error: httpx.HTTPStatusError) -> UnavailableError:
    return UnavailableError(
        f"the SuperLink refused ({error.response.status_code} {error.response.text[:200]}); "
        "wait for the next invitation"
    )
