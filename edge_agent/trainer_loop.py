"""The trainer child's life: join, answer whenever nudged, leave when told, alone or forgotten.

Three threads share it. One trains, for minutes perhaps; one answers the small stages of secure sums
meanwhile; the first listens to the daemon, so that "stop" always works. A lease ends the child by
itself: where neither a nudge nor a message came for so long, the coordinator has forgotten this
device, and a warm trainer holds memory for nothing. Until then it outlives SuperLink and
coordinator, since what it knows of a secure sum is nowhere else: a run's new session is joined in
the same process.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec

from edge_agent.flower_node import App, FlowerNode, load_node_key
from edge_agent.trainer_messages import (
    MessageWaits,
    RejoinTraining,
    StageAnswered,
    StageQuestion,
    StartTraining,
    StopTraining,
    ToTrainer,
    TrainerFailed,
    TrainerJoined,
    TrainerProgress,
    TrainerReplied,
)
from shared.child import ParentLink, die_with_parent
from shared.errors import PeerError, ShoalError, UnavailableError
from shared.logs import configure_logging
from shared.messages import RelayedStage

logger = logging.getLogger(__name__)
Say = Callable[[msgspec.Struct], None]
Incoming = queue.SimpleQueue[ToTrainer | None]
_START_DEADLINE_S = 60.0
_BUSY_POLL_S = 1.0  # a lease that is over waits for the answer that is being worked on
_POLL_S = 30.0  # nudges may get lost; messages should not


class AnswersStages(Protocol):
    """`SecureSums`, as far as the control link reaches it."""

    def answer(self, session: bytes, stage: RelayedStage, question: bytes) -> bytes:
        """Return the signed answer; raise a ShoalError where the question makes no sense."""
        ...


SumsIn = Callable[[Path], AnswersStages]


def serve(
    app: App, *, sums_in: SumsIn | None = None, interrupted: threading.Event | None = None
) -> NoReturn:
    """Be the trainer child for ``app``: speak with the parent until the end, then exit.

    Args:
        app: the ClientApp; one thread at a time calls it.
        sums_in: gives the secure sums that ``app`` takes part in, by the agent's home.
        interrupted: set while ``app`` works on what is wanted no more.
    """
    die_with_parent()
    configure_logging("INFO")
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    link: ParentLink[ToTrainer] = ParentLink(ToTrainer)
    signal.signal(signal.SIGTERM, lambda *_: link.incoming.put(None))
    parts = _Parts(app, link.send, link.incoming, sums_in, interrupted or threading.Event())
    cause = _serve_until_end(parts)
    if cause is not None:
        link.send(TrainerFailed(cause))
    logging.shutdown()
    # The training thread may be deep inside a numerical library, which does not survive an orderly
    # end of the interpreter around it.
    os._exit(0 if cause is None else 1)


@dataclass(frozen=True, slots=True)
class _Parts:
    app: App
    say: Say
    incoming: Incoming
    sums_in: SumsIn | None
    interrupted: threading.Event


def _serve_until_end(parts: _Parts) -> str | None:
    """Return None after an orderly end, else why this trainer could not go on."""
    try:
        start = parts.incoming.get(timeout=_START_DEADLINE_S)
        if isinstance(start, StartTraining):
            _train_until_told(start, parts)
    except ShoalError as error:
        return str(error)
    except Exception as error:  # the daemon must hear a sentence, whatever it was
        logger.exception("the trainer failed")
        return f"the trainer failed with {type(error).__name__}; see its log"
    return None


def _train_until_told(start: StartTraining, parts: _Parts) -> None:
    """Take part in one run; returns when told to stop, or when the lease is over.

    Raises:
        UnavailableError: the SuperLink is away at the start, or does not let this device in.
        DataError: the node key cannot be used.
    """
    stages = _Stages(parts.sums_in, Path(start.home), parts.say)
    stages.start()
    session: StartTraining | RejoinTraining | None = start
    before: _Work | None = None
    while session is not None:
        node = FlowerNode(
            address=session.superlink_address,
            ca_pem=session.superlink_ca_pem,
            private_key=load_node_key(Path(start.node_key_path)),
            app=parts.app,
            task=start.task,
            node_config={"home": start.home, "data": start.data_name},
            announce=lambda doing: parts.say(TrainerProgress(doing)),
        )
        work = _Work(node, parts, session.session_id, before=before)
        work.start()
        following: RejoinTraining | None = None
        try:
            following = _listen(work, stages, parts.incoming, lease_s=session.lease_s)
        finally:
            work.stop()
            node.leave(tell=following is None)
        if work.failure is not None:
            raise work.failure
        session, before = following, work


def _listen(
    work: "_Work", stages: "_Stages", incoming: Incoming, *, lease_s: float
) -> RejoinTraining | None:
    """Pass nudges and questions on until the end, or until the run goes on elsewhere."""
    heard_at = time.monotonic()
    while True:
        was_busy = work.is_busy  # read first: whoever is idle by now has noted its last answer
        left_s = max(heard_at, work.answered_at) + lease_s - time.monotonic()
        if left_s <= 0 and not was_busy:
            logger.info("nothing came for %.0f s; the lease is over", lease_s)
            return None
        try:
            message = incoming.get(timeout=left_s if left_s > 0 else _BUSY_POLL_S)
        except queue.Empty:
            continue
        heard_at = time.monotonic()
        match message:
            case MessageWaits():
                work.wake()
            case StageQuestion() as question:
                stages.ask(question)
            case RejoinTraining() as following:
                logger.info("the run goes on in a new session")
                return following
            case StopTraining(cause=cause):
                logger.info("stopped: %s", cause)
                return None
            case None:
                return None


class _Work:
    """The training thread of one session: joins, answers when woken, and now and then unasked."""

    def __init__(
        self, node: FlowerNode, parts: _Parts, session_id: str, *, before: "_Work | None"
    ) -> None:
        self.is_busy = True
        self.answered_at = time.monotonic()
        self.failure: Exception | None = None
        self._node = node
        self._parts = parts
        self._session_id = session_id
        self._before = before
        self._woken = threading.Event()
        self._stopping = threading.Lock()
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
        with self._stopping:
            self._stopped = True
        self._parts.interrupted.set()
        self._woken.set()

    def wait_until_ended(self) -> None:
        """Wait until nothing is under way any more; for after `stop`."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._join()
            self._wait_for_the_one_before()
            while not self._stopped:
                self._answer_all()
                self._rest()
        except Exception as error:  # noqa: BLE001  # handed to the listening thread, which raises it
            with self._stopping:
                if self._stopped:  # we hung up on it
                    logger.debug("dropped what was under way: %s", error)
                    return
                self.failure = error
            self._parts.incoming.put(None)

    def _join(self) -> None:
        """Join the SuperLink: at the start of a run or not at all, else whenever it is there."""
        while not self._stopped:
            try:
                self._node.join()
            except UnavailableError as error:
                if self._before is None:
                    raise
                logger.warning("not joined again yet: %s", error)
            else:
                self._parts.say(TrainerJoined(self._session_id))
                return
            self._rest()

    def _wait_for_the_one_before(self) -> None:
        """Let no two sessions train side by side: they would share torch's random numbers."""
        if self._before is not None:
            self._before.wait_until_ended()
            self._before = None
        with self._stopping:
            if not self._stopped:
                self._parts.interrupted.clear()

    def _rest(self) -> None:
        self.is_busy = False
        self._woken.wait(_POLL_S)
        self._woken.clear()
        self.is_busy = True

    def _answer_all(self) -> None:
        try:
            for message_id in self._node.work():
                self.answered_at = time.monotonic()
                self._parts.say(TrainerReplied(message_id, self._session_id))
        except UnavailableError as error:
            logger.warning("%s", error)  # the next nudge or poll finds out; the lease ends it all


class _Stages:
    """The thread that answers the small stages of secure sums, however long training takes."""

    def __init__(self, sums_in: SumsIn | None, home: Path, say: Say) -> None:
        self._sums_in = sums_in
        self._home = home
        self._say = say
        self._questions: queue.SimpleQueue[StageQuestion] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stages", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def ask(self, question: StageQuestion) -> None:
        """Have a question answered."""
        self._questions.put(question)

    def _run(self) -> None:
        while True:
            question = self._questions.get()
            try:
                answer = self._answer(question)
            except ShoalError as error:
                logger.warning("%s stage of a secure sum not answered: %s", question.stage, error)
            except Exception:  # one stage that fails must not silence those of the next sum
                logger.exception("%s stage of a secure sum not answered", question.stage)
            else:
                self._say(
                    StageAnswered(
                        message_id=question.message_id, stage=question.stage, answer=answer
                    )
                )

    def _answer(self, question: StageQuestion) -> bytes:
        if self._sums_in is None:
            raise PeerError("this trainer takes part in no sums")
        return self._sums_in(self._home).answer(question.session, question.stage, question.question)
