"""The run worker's door to the SuperLink: open a run, then use it through Flower's public Grid.

Flower's own `HttpGrid` interrupts its process when a token is void, waits in whole seconds and
holds all replies at once. `RunGrid` speaks the same wire, raises `UnavailableError` instead, and
hands out replies one by one, so that a worker's memory does not grow with their number.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cloud_coordinator.flower.run_bundle import CLIENT_APP, run_bundle
from cloud_coordinator.flower.superlink_calls import (
    Caller,
    ControlClient,
    ControlSecret,
    RuntimeClient,
    void_run,
)
from cloud_coordinator.flower.superlink_messages import SuperLinkSecrets
from shared.errors import PeerError, UnavailableError
from shared.framing import small_contents
from shared.tasks.spec import TaskSpec

logger = logging.getLogger(__name__)
_COMPONENT = "flwr-serverapp"
_POLL_S = 0.1
_STOP_PATIENCE_S = 2.0
_BATCH = 32  # replies asked for at once; what is in a batch is lost with the worker
_SUPERLINK = Node(node_id=SUPERLINK_NODE_ID)


@contextmanager
def open_run(
    *,
    address: str,
    ca_pem: str,
    secrets_path: Path,
    task: TaskSpec,
    client_app: str = CLIENT_APP,
    patience_s: float = 20.0,
) -> Iterator["RunGrid"]:
    """Start a Flower run, become its ServerApp, and stop it at the end; one at a time per process.

    Args:
        address: host:port of the SuperLink's private listener.
        ca_pem: the SuperLink's CA.
        secrets_path: what `SuperLink.secrets_path` said.
        task: reaches the ClientApp as the run configuration ``task``.
        client_app: the installed app that SuperNodes run.
        patience_s: how long a SuperLink that does not answer is waited for.

    Raises:
        UnavailableError: the SuperLink is away or another one than expected.
    """
    secrets = SuperLinkSecrets.read(secrets_path)
    bundle = run_bundle(task, client_app=client_app)
    root = ca_pem.encode()
    version = RuntimeVersionHttpInterceptor(component_name=_COMPONENT)
    caller = Caller(patience_s)
    guard = ControlSecret(secrets.control)
    executor = SuperExecAuthHttpInterceptor(
        master_secret=bytes.fromhex(secrets.superexec),
        protected_methods={"/flwr.proto.Runtime/AcquireTask"},
    )
    with (
        ControlClient.from_server_address(address, False, root, [version, guard]) as control,
        RuntimeClient.from_server_address(address, False, root, [version, executor]) as office,
    ):
        start = StartRunRequest(fab=fab_to_proto(bundle))
        run_id = caller.call(control.StartRun, start).run_id
        try:
            # The bundle's hash is the run's alone, so that workers never take each other's task.
            acquire = AcquireTaskRequest(agentapp_fab_hashes=[bundle.hash_str])
            token = caller.call(office.AcquireTask, acquire).token
            if not token:
                raise void_run()
            holder = RuntimeTokenHttpInterceptor(token)
            with (
                RuntimeClient.from_server_address(
                    address, False, root, [version, holder]
                ) as runtime,
                RunGrid(runtime, caller) as grid,
            ):
                yield grid
        finally:
            _stop_run(control, run_id)


class RunGrid(Grid):
    """Flower's Grid over one run that this process serves. Made by `open_run`."""

    def __init__(self, runtime: RuntimeClient, caller: Caller) -> None:
        self._runtime = runtime
        self._call = caller.call
        self._expiry: dict[str, float] = {}  # of messages not answered yet, on time.monotonic()
        self._unwanted: set[str] = set()
        self._arriving: dict[str, _Arrival] = {}  # by the id of the message that it answers
        self._heart = threading.Thread(
            target=caller.beat, args=(runtime,), name="task-heartbeat", daemon=True
        )
        self._end = caller.stop
        task_input = self._call(runtime.PullTaskInput, PullTaskInputRequest())
        self._run = run_from_proto(task_input.run)
        # `Message` takes the sender from this global: one run per process.
        TaskIdentity.task_id = task_input.task_id
        TaskIdentity.run_id = self._run.run_id
        TaskIdentity.node_id = task_input.context.node_id

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._heart.join()

    def set_run(self, run: Run) -> None:
        """Satisfy Flower's interface; the run is the one that was opened."""
        if run.run_id != self._run.run_id:
            raise ValueError("a RunGrid serves the run that it was opened for")

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; `Message` does the same and is what Flower recommends."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes that are online, whether or not they joined this run."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what the SuperLink knows about the nodes that are online."""
        return list(self._call(self._runtime.GetNodes, GetNodesRequest()).nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages with their objects; equal content travels and is kept once.

        Returns:
            The message ids in order, ``""`` where the SuperLink refused one (unknown node).

        Raises:
            UnavailableError: the SuperLink is gone, or has ended this run.
        """
        self._forget_expired()
        batch = list(messages)
        if not batch:
            return []
        with no_object_id_recompute():
            for message in batch:
                set_message_id(message)
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(m)) for m in batch],
                message_object_trees=[get_object_tree(message) for message in batch],
            )
            objects: dict[str, InflatableObject] = {}
            for message in batch:
                objects.update(get_all_nested_objects(message))
            inline = self._inline(batch)
            pushed = self._call(lambda asked: self._runtime.push_batch(asked, inline), request)
            for object_id in pushed.objects_to_push:
                self._push_object(object_id, objects[object_id], pushed.session_id)
        for message_id, message in zip(pushed.message_ids, batch, strict=True):
            self._expiry[message_id] = time.monotonic() + message.metadata.ttl
        self._expiry.pop("", None)
        return list(pushed.message_ids)

    def iter_replies(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are there; at most one large one is in memory at a time.

        A reply whose upload is still under way is kept in mind and yielded by a later call. One
        that failed anywhere comes as a message with an error; tell whose it is by
        ``metadata.reply_to_message_id``, since errors made by the SuperLink bear its own node id.

        Raises:
            UnavailableError: the SuperLink is gone, or has ended this run.
        """
        wanted = list(message_ids)
        arriving = [message_id for message_id in wanted if message_id in self._arriving]
        for message_id in arriving:
            yield from self._receive(self._arriving.pop(message_id))
        for batch in _batches([m for m in wanted if m not in arriving]):
            pulled, inline = self._call(
                self._runtime.pull_batch, PullAppMessagesRequest(message_ids=batch)
            )
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                expiry = self._expiry.pop(proto.metadata.reply_to_message_id, 0.0)
                message = message_from_proto(proto)
                # Flower's code consumes what it is given, and replies may share objects.
                own = {part.object_id for part in iterate_object_tree(tree)} & inline.keys()
                here = {object_id: inline[object_id] for object_id in own}
                if tree.object_id in here:
                    yield self._inflate(message, tree, here)
                else:
                    yield from self._receive(_Arrival(message, tree, expiry, here))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there; `iter_replies` needs less memory."""
        return list(self.iter_replies(message_ids))

    def discard(self, message_ids: Iterable[str]) -> None:
        """Forget messages whose replies nobody waits for any more, so the SuperLink can too.

        Messages whose time to live is over are forgotten with the next push in any case.
        """
        unwanted = set(message_ids)
        for message_id in unwanted:
            self._expiry.pop(message_id, None)
            self._confirm(message_id)
            if arrival := self._arriving.pop(message_id, None):
                self._confirm(arrival.tree.object_id)
        self._unwanted |= unwanted
        self._sweep()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and wait at most ``timeout`` seconds (None: for ever) for all replies."""
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while waiting:
            for reply in self.iter_replies(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if not waiting or time.monotonic() > deadline or self._end.wait(_POLL_S):
                break
        return replies

    def _inline(self, batch: Iterable[Message]) -> list[PushObjectRequest]:
        """Return the small objects, which travel with their messages."""
        small = small_contents(get_all_nested_objects(message) for message in batch)
        return [
            PushObjectRequest(node=_SUPERLINK, object_id=object_id, object_content=content)
            for object_id, content in small.items()
        ]

    def _push_object(self, object_id: str, item: InflatableObject, session_id: str) -> None:
        request = PushObjectRequest(
            node=_SUPERLINK,
            run_id=self._run.run_id,
            object_id=object_id,
            object_content=item.deflate(),
            session_id=session_id,
        )
        self._call(self._runtime.PushObject, request)

    def _receive(self, arrival: "_Arrival") -> Iterator[Message]:
        """Fetch one reply's content and let the SuperLink forget it; nothing while it uploads."""
        message, tree = arrival.message, arrival.tree
        if not message.has_error():
            try:
                message = self._with_content(message, tree, arrival.here)
            except _StillUploadingError:
                if time.monotonic() < arrival.deadline:
                    self._arriving[message.metadata.reply_to_message_id] = arrival
                    return
                message = self._incomplete(message.metadata)
        self._confirm(tree.object_id)
        yield message

    def _with_content(
        self, message: Message, tree: ObjectTree, here: Mapping[str, bytes]
    ) -> Message:
        contents = dict(here)
        for part in iterate_object_tree(tree):
            if part.object_id in {tree.object_id, *here}:  # the message itself came already
                continue
            request = PullObjectRequest(
                node=_SUPERLINK, run_id=self._run.run_id, object_id=part.object_id
            )
            pulled = self._call(self._runtime.PullObject, request)
            if not pulled.object_found:
                return self._incomplete(message.metadata)
            if not pulled.object_available:
                raise _StillUploadingError
            contents[part.object_id] = pulled.object_content
        return self._inflate(message, tree, contents)

    def _inflate(self, message: Message, tree: ObjectTree, contents: dict[str, bytes]) -> Message:
        """Return the message with its content; one with an error has none."""
        if message.has_error():
            return message
        try:
            content = _inflated(tree, contents)
        except Exception:  # the device's bytes, which Flower's code believes; the others go on
            logger.exception("a reply of node %d cannot be read", message.metadata.src_node_id)
            return self._incomplete(message.metadata, "the device's reply cannot be read")
        return make_message(metadata=message.metadata, content=content)

    def _incomplete(
        self, metadata: Metadata, cause: str = "the device did not finish its upload"
    ) -> Message:
        return make_message(
            metadata=Metadata(
                run_id=self._run.run_id,
                message_id="",
                src_node_id=SUPERLINK_NODE_ID,
                dst_node_id=SUPERLINK_NODE_ID,
                message_type=SYSTEM_MESSAGE_TYPE,
                group_id=metadata.group_id,
                ttl=0,
                reply_to_message_id=metadata.reply_to_message_id,
                created_at=now().timestamp(),
            ),
            error=Error(ErrorCode.MESSAGE_UNAVAILABLE, cause),
        )

    def _confirm(self, message_id: str) -> None:
        request = ConfirmMessageReceivedRequest(
            node=_SUPERLINK, run_id=self._run.run_id, message_object_id=message_id
        )
        self._call(self._runtime.ConfirmMessageReceived, request)

    def _forget_expired(self) -> None:
        present = time.monotonic()
        self.discard([message_id for message_id, end in self._expiry.items() if end < present])

    def _sweep(self) -> None:
        """Drop replies that came after all, or expired, for messages that were discarded."""
        for batch in _batches(list(self._unwanted)):
            pulled = self._call(
                self._runtime.PullMessages, PullAppMessagesRequest(message_ids=batch)
            )
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                self._confirm(tree.object_id)
                self._unwanted.discard(proto.metadata.reply_to_message_id)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A reply that the SuperLink has announced to us, and will not announce again."""

    message: Message  # without its content
    tree: ObjectTree
    deadline: float  # of the question, on time.monotonic()
    here: Mapping[str, bytes]  # objects that came with the announcement, by their ids


class _StillUploadingError(Exception):
    """A reply is visible before its last object is there."""


def set_message_id(message: Message) -> None:
    """Name a message by its content's hash, as Flower's own senders do before they send it."""
    message.metadata.__dict__["_message_id"] = message.object_id


def _inflated(tree: ObjectTree, contents: dict[str, bytes]) -> RecordDict:
    """Put a message's content together; raises whatever Flower raises on bytes that are none."""
    (content_tree,) = tree.children
    content = inflate_object_from_contents(content_tree.object_id, contents)
    if not isinstance(content, RecordDict):
        raise PeerError(f"a message holds a {type(content).__name__}")
    return content


def _stop_run(control: ControlHttpClient, run_id: int) -> None:
    """End the run, which makes the SuperLink drop its messages and objects."""
    try:
        Caller(_STOP_PATIENCE_S).call(control.StopRun, StopRunRequest(run_id=run_id))
    except UnavailableError as error:
        logger.info("run was not stopped in order: %s", error)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))
