"""The ClientApp: what a device does with a train or an evaluate message.

It uses Flower's public Message API only, so the same app runs in our warm trainer, on stock
SuperNodes and in Flower's simulation engine, and gives the same parameters there.

A train message holds the records ``parameters`` (one float32 vector) and ``plan`` (``json``: a
`TrainingPlan`; ``round``, ``seed``, ``min_examples``); its reply ``parameters`` and ``metrics``. An
evaluate message holds ``parameters``, its reply ``metrics``. A device that cannot do what it is
asked replies with an error whose reason is one sentence, and which tells nothing of the data.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import LocalData, read_local_data
from edge_agent.training import evaluate, train
from shared.errors import ConfigError, DataError, PeerError, ShoalError
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.tasks.spec import TaskSpec
from shared.untrusted import NOT_JSON

logger = logging.getLogger(__name__)

REFUSED = 2  # Flower's code for "the ClientApp raised", the nearest there is


class TrainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The plan record of a train message, checked."""

    json: str
    round: int
    seed: int
    min_examples: int


def build_client_app(
    load: Callable[[Context], LocalData], *, should_stop: Callable[[], bool] = lambda: False
) -> ClientApp:
    """Return the app for data that ``load`` finds.

    Args:
        load: gives task and data for a context; called for each message, so it should remember.
        should_stop: asked before each batch; the message is then answered by an error.
    """

    def answer(
        message: Message, context: Context, work: Callable[[LocalData], RecordDict]
    ) -> Message:
        # One thread: the daemon and the inference server need the rest of the machine, and in its
        # last digits the result depends on the number of threads.
        torch.set_num_threads(1)
        try:
            return Message(work(load(context)), reply_to=message)
        except ShoalError as error:
            logger.warning("message refused: %s", error)
            return Message(Error(REFUSED, str(error)), reply_to=message)

    app = ClientApp()

    @app.train()
    def _(message: Message, context: Context) -> Message:
        return answer(message, context, lambda data: _train(message, data, should_stop))

    @app.evaluate()
    def _(message: Message, context: Context) -> Message:
        return answer(message, context, lambda data: _evaluate(message, data))

    return app


def _train(message: Message, data: LocalData, should_stop: Callable[[], bool]) -> RecordDict:
    request, plan = _request_in(message.content)
    if len(data.train) < max(1, request.min_examples):
        raise DataError(
            f"this device has {len(data.train)} training examples, "
            f"the run wants {request.min_examples}"
        )
    update = train(
        data.task,
        _parameters_in(message.content),
        data.train,
        plan,
        seed=device_seed(request.seed, request.round, data.digest),
        should_stop=should_stop,
        device=_device(),
    )
    metrics = MetricRecord({"examples": float(update.num_examples), **update.sums})
    return RecordDict({"parameters": ArrayRecord([update.parameters]), "metrics": metrics})


def _evaluate(message: Message, data: LocalData) -> RecordDict:
    sums = evaluate(data.task, _parameters_in(message.content), data.held_out, device=_device())
    return RecordDict({"metrics": MetricRecord({**sums})})


def device_seed(seed: int, round_number: int, digest: str) -> int:
    """Return the seed of one device in one round: of its data, so that it needs no name.

    The same data give the same seed in every transport. It never leaves the device.
    """
    content = f"shoal device seed 1:{seed}:{round_number}:{digest}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) >> 1  # torch takes 63 bits


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parameters_in(content: RecordDict) -> Vector:
    record = content.array_records.get("parameters")
    if record is None or len(record) != 1:
        raise PeerError("the message holds no single vector of parameters")
    (vector,) = record.to_numpy_ndarrays()
    if vector.dtype != np.float32:
        raise PeerError(f"the message holds parameters of type {vector.dtype}, not float32")
    return vector


def _request_in(content: RecordDict) -> tuple[TrainRequest, TrainingPlan]:
    record = content.config_records.get("plan", ConfigRecord())
    try:
        request = msgspec.convert(dict(record), TrainRequest)
        return request, msgspec.json.decode(request.json, type=TrainingPlan)
    except NOT_JSON as error:
        raise PeerError(f"the training plan in the message does not fit: {error}") from error


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
    home = context.node_config.get("home")
    if not home:
        raise ConfigError("the node's configuration names no home; give --node-config 'home=\"…\"'")
    try:
        task = msgspec.json.decode(str(context.run_config.get("task")), type=TaskSpec)
    except NOT_JSON as error:
        raise PeerError("the run names no task; start it through Shoal") from error
    entry = DataRegistry(Path(str(home))).find(task)
    wanted = context.node_config.get("data", entry.name)
    if entry.name != wanted:
        raise DataError(f"data {wanted!r} do not serve task {task.name!r}")
    # The owner's spec, not the run's, decides which code is imported; their digests are the same.
    return _read_once(entry.path, entry.name, msgspec.json.encode(entry.task))


@functools.lru_cache(maxsize=1)  # a trainer serves one run
def _read_once(path: str, name: str, task: bytes) -> LocalData:
    try:
        return read_local_data(Path(path), msgspec.json.decode(task, type=TaskSpec))
    except DataError as error:
        logger.warning("data %r cannot be read: %s", name, error)
        raise DataError(
            f"data {name!r} no longer fit their task; "
            f"the owner sees why with `shoal-agent data check {name}`"
        ) from error


app = build_client_app(load_from_home)
