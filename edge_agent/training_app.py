"""The ClientApp: what a device does with the messages of a run.

It uses Flower's public Message API only, so the same app runs in our warm trainer, on stock
SuperNodes and in Flower's simulation engine, and gives the same parameters there.

A train message holds the records ``parameters`` (one float32 vector) and ``plan`` (``json``: a
`TrainingPlan`; ``round``, ``seed``, ``min_examples``), an evaluate message ``parameters``; where
another network of the task is meant, both hold ``student`` (``json``: a `StudentPlan`) and, where
it learns from a trained one, ``teacher`` (its parameters). A
``query.statistics`` message ``statistics`` (``json``: a `StatisticsQuestion`) and, where that is
about the inside of a model, ``model`` (its ONNX file); a ``query.judge`` message ``question``
(``json``: a `JudgeQuestion`) and ``files`` (its candidates, in their order). With the record
``sum`` (see secure_messages.py) the result goes into a secure sum: the reply holds a signed answer
alone, and ``query.mask`` asks for the masked vector. The stages around it, ``query.share``,
``query.consent`` and ``query.reveal``, come this way where there is no control link.

Without ``sum`` the reply would hold ``parameters`` and ``metrics`` of this one device, and there is
one only if the owner allows that. A device that cannot do what it is asked replies with an error
whose reason is one sentence, and which tells nothing of the data.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_agent.contributions import (
    Contribution,
    evaluation_contribution,
    judgement_contribution,
    statistics_contribution,
    training_contribution,
)
from edge_agent.data_registry import DataRegistry
from edge_agent.eligibility import too_few
from edge_agent.judging import judge
from edge_agent.kept_sums import KeptSums
from edge_agent.local_data import LocalData, read_local_data
from edge_agent.measuring import measure_extremes
from edge_agent.privacy.sources import DataUse, Part
from edge_agent.reply_guard import UndeclaredFieldError, check_reply
from edge_agent.secure_messages import reply_with, sealed_config_in, stage_question_in
from edge_agent.sum_access import Sums
from edge_agent.training import DivergedError, Teacher, Update, evaluate, train
from shared.errors import (
    ConfigError,
    DataError,
    PeerError,
    ShoalError,
    StoppedError,
    UnavailableError,
)
from shared.judging import MAX_JUDGED_BYTES, JudgeQuestion, base_of_files, judge_question
from shared.messages import RelayedStage
from shared.npy import read_vector
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.secure_sum.config import Purpose, SumConfig
from shared.secure_sum.questions import (
    base_digest_of,
    evaluation_question,
    statistics_question,
    training_question,
)
from shared.statistics.probes import Probe, contract_of_probe, rows_of_probe
from shared.statistics.questions import StatisticsQuestion
from shared.student_plan import StudentPlan
from shared.tasks.examples import Examples
from shared.tasks.spec import TaskSpec
from shared.tasks.students import student_of
from shared.tasks.task import Task
from shared.untrusted import NOT_JSON

logger = logging.getLogger(__name__)

_Handler = Callable[[Message, Context], Message]
REFUSED = 2  # Flower's code for "the ClientApp raised", the nearest there is


class TrainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The plan record of a train message, checked."""

    json: str
    round: int
    seed: int
    min_examples: int


def build_client_app(
    load: Callable[[Context], LocalData],
    *,
    sums_of: Callable[[Context], Sums],
    should_stop: Callable[[], bool] = lambda: False,
) -> ClientApp:
    """Return the app for data that ``load`` finds.

    Args:
        load: gives task and data for a context; called for each message, so it should remember.
        sums_of: gives the device's secure sums for a context; likewise.
        should_stop: asked before each batch; the message is then answered by an error.
    """
    reached = _Reached(load, sums_of, should_stop)
    app = ClientApp()
    app.train()(reached.by(lambda device, message: device.train(message)))
    app.evaluate()(reached.by(lambda device, message: device.evaluate(message)))
    app.query("statistics")(reached.by(lambda device, message: device.answer_statistics(message)))
    app.query("judge")(reached.by(lambda device, message: device.judge(message)))
    app.query("mask")(reached.at_stage(lambda sums, *asked: reply_with(*sums.mask(*asked))))
    for stage in ("share", "consent", "reveal"):
        app.query(stage)(reached.at_stage(_answer_of(stage)))
    return app


def _answer_of(stage: RelayedStage) -> Callable[[Sums, bytes, bytes], RecordDict]:
    return lambda sums, session, question: reply_with(sums.answer(session, stage, question))


class _Reached:
    """Turns what is to be done for a message into what Flower calls; errors become replies."""

    def __init__(
        self,
        load: Callable[[Context], LocalData],
        sums_of: Callable[[Context], Sums],
        should_stop: Callable[[], bool],
    ) -> None:
        self._load, self._sums_of, self._should_stop = load, sums_of, should_stop

    def by(self, work: Callable[["_Device", Message], RecordDict]) -> _Handler:
        """Handle messages about the owner's data."""

        def handle(message: Message, context: Context) -> Message:
            # One thread: the daemon and the inference server need the rest of the machine, and in
            # its last digits the result depends on the number of threads.
            torch.set_num_threads(1)
            return _reply(message, lambda: work(self._device(context), message))

        return handle

    def at_stage(self, work: Callable[[Sums, bytes, bytes], RecordDict]) -> _Handler:
        """Handle later stages of secure sums, which need no data any more."""

        def handle(message: Message, context: Context) -> Message:
            return _reply(
                message, lambda: work(self._sums_of(context), *stage_question_in(message.content))
            )

        return handle

    def _device(self, context: Context) -> "_Device":
        data, sums = self._load(context), self._sums_of(context)
        return _Device(data, sums, context.run_id, self._should_stop)


def _reply(message: Message, work: Callable[[], RecordDict]) -> Message:
    try:
        content = work()
        check_reply(content, is_summed="sum" in message.content.config_records)
        return Message(content, reply_to=message)
    except UnavailableError as error:  # it may name paths of this device
        logger.warning("message refused: %s", error)
        cause = "something this device needs is not there now; see the log on the device"
    except ShoalError as error:
        logger.warning("message refused: %s", error)
        cause = str(error)
    except UndeclaredFieldError as error:
        logger.error("reply held back: %s", error)  # noqa: TRY400  # where it was found says nothing
        cause = "this device held its reply back; see the log on the device"
    except Exception as error:  # stock Flower would send its text, which may quote local data
        logger.exception("the client app failed")
        cause = f"{type(error).__name__} in the client app; see the log on the device"
    return Message(Error(REFUSED, cause), reply_to=message)


class _Device:
    """What one message meets: the owner's data, and the way out for what is derived from them."""

    def __init__(
        self, data: LocalData, sums: Sums, flower_run: int, should_stop: Callable[[], bool]
    ) -> None:
        self._data, self._sums = data, sums
        self._run_id = str(flower_run)  # a plain round has no other name here
        self._should_stop = should_stop

    def train(self, message: Message) -> RecordDict:
        content = message.content
        request, plan = _request_in(content)
        received = _parameters_in(content)
        student = _student_in(content)
        task, teacher = self._task_of(student), self._teacher_of(student, content)
        if reason := too_few(len(self._data.train), request.min_examples):
            raise DataError(reason)

        def update() -> Update:
            return train(
                task,
                received,
                self._data.train,
                plan,
                seed=device_seed(request.seed, request.round, self._data.digest),
                teacher=teacher,
                should_stop=self._should_stop,
                device=_torch_device(),
            )

        def update_or_nothing() -> Update:
            try:
                return update()
            except DivergedError as error:  # to say no would tell of this device's data
                logger.warning("%s; zeros go into the sum", error)
            except (StoppedError, PeerError):  # of what was asked, not of the data
                raise
            except Exception:  # so would a task whose code fails on what its rows make of a model
                logger.exception("the task failed; zeros go into the sum")
            return Update.nothing(received)

        sealed = sealed_config_in(content)
        if sealed is None:
            self._sums.allow_plain_update(self._run_id, request.round, self._use("train"))
            trained = update()
            metrics = MetricRecord({"examples": float(trained.num_examples), **trained.sums})
            return RecordDict({"parameters": ArrayRecord([trained.parameters]), "metrics": metrics})
        return self._take_part(
            sealed,
            "train",
            lambda config: training_contribution(config, received, update_or_nothing()),
            question_digest=training_question(request.json.encode(), _student_json(content)),
            base_digest=base_digest_of(received),
            part="train",
        )

    def evaluate(self, message: Message) -> RecordDict:
        received = _parameters_in(message.content)
        task = self._task_of(_student_in(message.content))

        def sums() -> dict[str, float]:
            return evaluate(task, received, self._data.held_out, device=_torch_device())

        def sums_or_none() -> dict[str, float]:
            try:
                return sums()
            except PeerError:
                raise
            except Exception:  # see `train`: to say no would tell of this device's data
                logger.exception("the task failed; nothing was measured")
                return {"examples": 0.0}

        sealed = sealed_config_in(message.content)
        if sealed is None:
            round_number = _round_of(message)
            self._sums.allow_plain_update(self._run_id, round_number, self._use("held-out"))
            return RecordDict({"metrics": MetricRecord({**sums()})})
        return self._take_part(
            sealed,
            "evaluate",
            lambda config: evaluation_contribution(config, sums_or_none(), task.statistics),
            question_digest=evaluation_question(_student_json(message.content)),
            base_digest=base_digest_of(received),
            part="held-out",
        )

    def answer_statistics(self, message: Message) -> RecordDict:
        content = message.content
        sealed = sealed_config_in(content)
        if sealed is None:
            raise PeerError("statistics leave a device only in a secure sum")
        text = content.config_records.get("statistics", ConfigRecord()).get("json")
        try:
            question = msgspec.json.decode(str(text), type=StatisticsQuestion)
        except NOT_JSON as error:
            raise PeerError(f"the message asks for no statistics: {error}") from error
        contract = self._data.task.contract
        rows: Callable[[], Examples] = lambda: self._data.train  # noqa: E731  # or from a model
        if (probe := question.probe) is not None:
            model = _model_in(content, probe.model_sha256)
            contract = contract_of_probe(probe)
            rows = partial(self._inside, model, probe, max_rows=question.max_rows)
        return self._take_part(
            sealed,
            "statistics",
            lambda config: statistics_contribution(config, question, contract, rows()),
            question_digest=statistics_question(str(text).encode()),
            base_digest=None,
            part="train",
        )

    def judge(self, message: Message) -> RecordDict:
        content = message.content
        sealed = sealed_config_in(content)
        if sealed is None:
            raise PeerError("scores leave a device only in a secure sum")
        text = str(content.config_records.get("question", ConfigRecord()).get("json"))
        try:
            question = msgspec.json.decode(text, type=JudgeQuestion)
        except NOT_JSON as error:
            raise PeerError(f"the message asks for no judgement: {error}") from error
        files = _files_in(content, [candidate.sha256 for candidate in question.candidates])

        def contribute(config: SumConfig) -> Contribution:
            rows, task = self._data.held_out, self._data.task
            judged = judge(question, files, task, rows, should_stop=self._should_stop)
            return judgement_contribution(config, *judged)

        return self._take_part(
            sealed,
            "evaluate",
            contribute,
            question_digest=judge_question(text.encode()),
            base_digest=base_of_files(question.candidates),
            part="held-out",
        )

    def _inside(self, model: bytes, probe: Probe, *, max_rows: int) -> Examples:
        """Return what the rows do inside a model: of evenly spaced ones, as many as may count."""
        inputs = self._data.train.inputs
        chosen = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), max_rows)).astype(int))
        try:
            found = measure_extremes(model, probe, inputs[chosen], should_stop=self._should_stop)
        except (StoppedError, PeerError, UnavailableError):  # of what was asked, or of this device
            raise
        except Exception:  # to say no would tell of this device's data
            logger.exception("the model failed on the rows; zeros go into the sum")
            found = np.zeros((0, len(probe.columns)), np.float32)
        return rows_of_probe(probe, found)

    def _task_of(self, student: StudentPlan | None) -> Task:
        """Return the owner's task, with the network that is asked for."""
        task = self._data.task
        return task if student is None else student_of(task, student.network)

    def _teacher_of(self, student: StudentPlan | None, content: RecordDict) -> Teacher | None:
        """Return whom a student learns from; PeerError unless it is the one that was signed."""
        if student is None or (distil := student.distil) is None:
            return None
        parameters = _parameters_in(content, "teacher")
        if base_digest_of(parameters) != distil.teacher:
            raise PeerError("the teacher that came along is not the one of this question")
        return Teacher(self._data.task, parameters, distil.temperature, distil.weight)

    def _take_part(
        self,
        sealed_config: bytes,
        purpose: Purpose,
        contribute: Callable[[SumConfig], Contribution],
        *,
        question_digest: str,
        base_digest: str | None,
        part: Part,
    ) -> RecordDict:
        """Open the sum, make the vector, and reply with an answer that says nothing of it."""
        opened = self._sums.open(
            sealed_config,
            task_digest=self._data.task_digest,
            question_digest=question_digest,
            base_digest=base_digest,
            data=self._use(part),
        )
        if opened.config.purpose != purpose:
            reason = f"a sum to {opened.config.purpose} came with a message to {purpose}"
            return reply_with(self._sums.decline(opened, reason))
        try:
            made = contribute(opened.config)
        except ShoalError as error:
            logger.warning("declined: %s", error)
            return reply_with(self._sums.decline(opened, str(error)))
        except Exception:
            self._sums.decline(opened, "this device failed")
            raise
        content = reply_with(self._sums.advertise(opened, made.vector, made.exact))
        if made.facts:
            content["facts"] = ConfigRecord({"json": msgspec.json.encode(made.facts)})
        return content

    def _use(self, part: Part) -> DataUse:
        data = self._data
        return self._sums.data_use(name=data.name, path=data.path, digest=data.digest, part=part)


def device_seed(seed: int, round_number: int, digest: str) -> int:
    """Return the seed of one device in one round: of its data, so that it needs no name.

    The same data give the same seed in every transport. It never leaves the device.
    """
    content = f"shoal device seed 1:{seed}:{round_number}:{digest}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) >> 1  # torch takes 63 bits


def _torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _student_json(content: RecordDict) -> bytes:
    record = content.config_records.get("student")
    return b"" if record is None else str(record.get("json")).encode()


def _student_in(content: RecordDict) -> StudentPlan | None:
    if not (text := _student_json(content)):
        return None
    try:
        return msgspec.json.decode(text, type=StudentPlan)
    except NOT_JSON as error:
        raise PeerError(f"the student in the message does not fit: {error}") from error


def _parameters_in(content: RecordDict, name: str = "parameters") -> Vector:
    record = content.array_records.get(name)
    if record is None or len(record) != 1:
        raise PeerError(f"the message holds no single vector of {name}")
    (array,) = record.values()
    # torch warns of arrays that it may not write to, so it gets a copy.
    vector: Vector = read_vector(array.data, {"<f4": np.float32}, what="the message").copy()
    return vector


def _model_in(content: RecordDict, sha256: str) -> bytes:
    """Return the file that came along; raise PeerError unless it is the one that is asked about."""
    (file,) = _files_in(content, [sha256], record="model")
    return file


def _files_in(content: RecordDict, digests: Sequence[str], *, record: str = "files") -> list[bytes]:
    """Return the files that came along; raise PeerError unless they are those asked about."""
    arrays = list(content.array_records.get(record, ArrayRecord()).values())
    if len(arrays) != len(digests):
        raise PeerError(f"{len(arrays)} models came along, and {len(digests)} are asked about")
    if sum(len(array.data) for array in arrays) > MAX_JUDGED_BYTES:
        raise PeerError(f"the models that came along are larger than {MAX_JUDGED_BYTES} bytes")
    files: list[bytes] = [
        read_vector(array.data, {"|u1": np.uint8}, what="the message").tobytes() for array in arrays
    ]
    for file, sha256 in zip(files, digests, strict=True):
        if hashlib.sha256(file).hexdigest() != sha256:
            raise PeerError("a model that came along is not the one that is asked about")
    return files


def _round_of(message: Message) -> int:
    """Return the number that the rounds give as the group of their messages."""
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0


def _request_in(content: RecordDict) -> tuple[TrainRequest, TrainingPlan]:
    record = content.config_records.get("plan", ConfigRecord())
    try:
        request = msgspec.convert(dict(record), TrainRequest)
        return request, msgspec.json.decode(request.json, type=TrainingPlan)
    except NOT_JSON as error:
        raise PeerError(f"the training plan in the message does not fit: {error}") from error


def home_of(context: Context) -> Path:
    """Return the agent's home; raise ConfigError where the node's configuration lacks ``home``."""
    home = context.node_config.get("home")
    if not home:
        raise ConfigError("the node's configuration names no home; give --node-config 'home=\"…\"'")
    return Path(str(home))


def load_from_home(context: Context) -> LocalData:
    """Return the data that the owner gave to the run's task, read once per process.

    Args:
        context: ``node_config`` names the agent's ``home`` and, optionally, the ``data`` in its
            registry; ``run_config`` holds the task as JSON.

    Raises:
        ConfigError: the node's configuration lacks ``home``.
        PeerError: the run names no task.
        DataError: the owner gave no such data to exactly this task, or they broke.
    """
    home = home_of(context)
    try:
        task = msgspec.json.decode(str(context.run_config.get("task")), type=TaskSpec)
    except NOT_JSON as error:
        raise PeerError("the run names no task; start it through Shoal") from error
    entry = DataRegistry(home).find(task)
    wanted = context.node_config.get("data", entry.name)
    if entry.name != wanted:
        raise DataError(f"data {wanted!r} do not serve task {task.name!r}")
    # The owner's spec, not the run's, decides which code is imported; their digests are the same.
    return _read_once(entry.path, entry.name, msgspec.json.encode(entry.task))


@functools.lru_cache(maxsize=1)  # a trainer serves one run
def _read_once(path: str, name: str, task: bytes) -> LocalData:
    try:
        return read_local_data(Path(path), msgspec.json.decode(task, type=TaskSpec), name=name)
    except DataError as error:
        logger.warning("data %r cannot be read: %s", name, error)
        raise DataError(
            "the data for this task no longer fit it; "
            "the owner sees why with `shoal-agent data check`"
        ) from error


def _kept_sums(context: Context) -> KeptSums:
    return KeptSums(home_of(context))


# For stock SuperNodes, by its name; our own trainer builds one around sums of its own process.
app = build_client_app(load_from_home, sums_of=_kept_sums)
