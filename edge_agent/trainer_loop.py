"""The trainer child's life: join, answer whenever nudged, leave when told, alone or forgotten.

Two threads share it. One trains, for minutes perhaps; the other listens to the daemon meanwhile, so
that "stop" always works. A lease ends the child by itself: where neither a nudge nor a message came
for so long, the coordinator has forgotten this device, and a warm trainer holds memory for nothing.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from edge_agent.flower_node import App, FlowerNode, load_node_key
from edge_agent.trainer_messages import (
    MessageWaits,
    StartTraining,
    StopTraining,
    ToTrainer,
    TrainerFailed,
    TrainerJoined,
    TrainerProgress,
    TrainerReplied,
)
from shared.child import ParentLink, die_with_parent
from shared.errors import ShoalError, UnavailableError
from shared.logs import configure_logging

logger = logging.getLogger(__name__)
Say = Callable[[msgspec.Struct], None]
Incoming = queue.SimpleQueue[ToTrainer | None]
_START_DEADLINE_S = 60.0
_BUSY_POLL_S = 1.0  # a lease that is over waits for the answer that is being worked on
_POLL_S = 30.0  # nudges may get lost; messages should not


def serve(app: App) -> NoReturn:
    """Be the trainer child for ``app``: speak with the parent until the end, then exit."""
    die_with_parent()
    configure_logging("INFO")
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    link: ParentLink[ToTrainer] = ParentLink(ToTrainer)
    signal.signal(signal.SIGTERM, lambda *_: link.incoming.put(None))
    cause = _serve_until_end(app, link)
    if cause is not None:
        link.send(TrainerFailed(cause))
    logging.shutdown()
    # The training thread may be deep inside a numerical library, which does not survive an orderly
    # end of the interpreter around it.
    os._exit(0 if cause is None else 1)


def _serve_until_end(app: App, link: ParentLink[ToTrainer]) -> str | None:
    """Return None after an orderly end, else why this trainer could not go on."""
    try:
        start = link.incoming.get(timeout=_START_DEADLINE_S)
        if isinstance(start, StartTraining):
            train_until_told(start, app, incoming=link.incoming, say=link.send)
    except ShoalError as error:
        return str(error)
    except Exception as error:  # the daemon must hear a sentence, whatever it was
        logger.exception("the trainer failed")
        return f"the trainer failed with {type(error).__name__}; see its log"
    return None


def train_until_told(start: StartTraining, app: App, *, incoming: Incoming, say: Say) -> None:
    """Take part in one run; returns when told to stop, or when the lease is over.

    Args:
        start: which run, task, data and SuperLink.
        app: the ClientApp.
        incoming: what the daemon says; None when it is gone.
        say: tells the daemon.

    Raises:
        UnavailableError: the SuperLink is away at the start, or does not let this device in.
        DataError: the node key cannot be used.
    """
    node = FlowerNode(
        address=start.superlink_address,
        ca_pem=start.superlink_ca_pem,
        private_key=load_node_key(Path(start.node_key_path)),
        app=app,
        task=start.task,
        node_config={"home": start.home, "data": start.data_name},
        announce=lambda doing: say(TrainerProgress(doing)),
    )
    with node:
        node.join()
        say(TrainerJoined())
        work = _Work(node, incoming, say)
        work.start()
        try:
            _listen(work, incoming, lease_s=start.lease_s)
        finally:
            work.stop()
        if work.failure is not None:
            raise work.failure


def _listen(work: "_Work", incoming: Incoming, *, lease_s: float) -> None:
    """Pass nudges on until the end."""
    nudged_at = time.monotonic()
    while True:
        was_busy = work.is_busy  # read first: whoever is idle by now has noted its last answer
        left_s = max(nudged_at, work.answered_at) + lease_s - time.monotonic()
        if left_s <= 0 and not was_busy:
            logger.info("nothing came for %.0f s; the lease is over", lease_s)
            return
        try:
            message = incoming.get(timeout=left_s if left_s > 0 else _BUSY_POLL_S)
        except queue.Empty:
            continue
        if isinstance(message, MessageWaits):
            nudged_at = time.monotonic()
            work.wake()
        elif isinstance(message, StopTraining):
            logger.info("stopped: %s", message.cause)
            return
        elif message is None:
            return


class _Work:
    """The training thread: answers messages when woken, and now and then unasked."""

    def __init__(self, node: FlowerNode, incoming: Incoming, say: Say) -> None:
        self.is_busy = False
        self.answered_at = time.monotonic()
        self.failure: Exception | None = None
        self._node = node
        self._incoming = incoming
        self._say = say
        self._woken = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)

    def start(self) -> None:
        """Begin, and look for messages at once: one may have come before we joined."""
        self._thread.start()

    def wake(self) -> None:
        """Look for messages now."""
        self._woken.set()

    def stop(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        self._stopped = True
        self._woken.set()

    def _run(self) -> None:
        try:
            while not self._stopped:
                self.is_busy = True
                self._answer_all()
                self.is_busy = False
                self._woken.wait(_POLL_S)
                self._woken.clear()
        except Exception as error:  # noqa: BLE001  # handed to the listening thread, which raises it
            self.failure = error
            self._incoming.put(None)

    def _answer_all(self) -> None:
        try:
            for message_id in self._node.work():
                self.answered_at = time.monotonic()
                self._say(TrainerReplied(message_id))
        except UnavailableError as error:
            logger.warning("%s", error)  # the next nudge or poll finds out; the lease ends it all
