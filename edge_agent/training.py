"""Training and measuring on one device's examples: the door to torch, and pure.

The same parameters, examples, plan and seed give the same update, whoever calls and whatever was
trained before. Threads and devices are the caller's choice.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.errors import ConfigError, StoppedError
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.tasks.examples import Examples
from shared.tasks.task import Task
from shared.tasks.vectors import load_vector, to_vector

_EVALUATION_BATCH = 512


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What training gave."""

    parameters: Vector  # shape (d,), after training
    num_examples: int  # rows that the device trains on: its weight in the mean
    sums: dict[str, float]  # ``seen`` examples and their ``loss_sum``, while training

    @classmethod
    def nothing(cls, parameters: Vector) -> Self:
        """Return what changes nothing and weighs nothing: the place of an update that diverged."""
        return cls(parameters, 0, {"seen": 0.0, "loss_sum": 0.0})


class DivergedError(ConfigError):
    """Training left the finite numbers. Whoever chose the parameters may have meant it to."""


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A trained network whose answers a student learns beside the labels."""

    task: Task  # of the teacher's network
    parameters: Vector  # shape (e,)
    temperature: float
    weight: float  # of its word, in [0, 1]


def train(
    task: Task,
    parameters: Vector,
    examples: Examples,
    plan: TrainingPlan,
    *,
    seed: int,
    teacher: Teacher | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    device: str = "cpu",
) -> Update:
    """Run minibatch SGD from ``parameters`` over the device's examples.

    Args:
        task: gives network and loss.
        parameters: shape (d,), where to start from.
        examples: at least one.
        plan: epochs, batches, step size.
        seed: decides the order of examples and what else is random in the network (dropout).
        teacher: whom the network learns from besides; None: nobody.
        should_stop: asked before each batch.
        device: a torch device; results on a GPU may differ in the last digits.

    Raises:
        PeerError: ``parameters``, or the teacher's, are not those of their task's network.
        StoppedError: ``should_stop`` said so.
        DivergedError: the update is not finite; said at the end, so that the time that it took says
            nothing.
        ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("there is nothing to train on")
    with _own_randomness(seed, device):
        model = _build(task, parameters, device).train()
        step, loss_of = _Sgd(model, plan), _loss_of(task, teacher, device)
        loss_sum, seen = 0.0, 0
        for rows in _batches(len(examples), plan, np.random.default_rng(seed)):
            if should_stop():
                raise StoppedError("training was stopped")
            inputs, targets = _tensors(task, examples.take(rows), device)
            loss = loss_of(inputs, model(inputs), targets)
            loss_sum += float(loss.detach()) * len(targets)
            seen += len(targets)
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            step()
        trained = to_vector(model)
    if not (math.isfinite(loss_sum) and np.isfinite(trained).all()):
        raise _diverged(plan)
    return Update(trained, len(examples), {"seen": float(seen), "loss_sum": loss_sum})


def evaluate(
    task: Task, parameters: Vector, examples: Examples, *, device: str = "cpu"
) -> dict[str, float]:
    """Measure ``parameters``, shape (d,), on examples.

    Returns:
        The task's additive statistics; only ``examples`` = 0 where there are none.

    Raises:
        PeerError: ``parameters`` are not those of this task's network.
    """
    if not len(examples):
        return {"examples": 0.0}
    sums: dict[str, float] = {}
    model = _build(task, parameters, device).eval()
    with torch.inference_mode():
        for start in range(0, len(examples), _EVALUATION_BATCH):
            rows = np.arange(start, min(start + _EVALUATION_BATCH, len(examples)))
            inputs, targets = _tensors(task, examples.take(rows), device)
            for name, value in task.measure(model(inputs), targets).items():
                sums[name] = sums.get(name, 0.0) + value
    return sums


def score(task: Task, outputs: Vector, targets: NDArray[Any]) -> float:
    """Return how good outputs are for their targets, in [0, 1].

    Args:
        task: that they are of.
        outputs: shape (n, …), n at least 1.
        targets: shape (n,).
    """
    return task.score(task.measure(torch.tensor(outputs), torch.tensor(targets)))


def _loss_of(
    task: Task, teacher: Teacher | None, device: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the loss of a batch from its inputs, the network's outputs, and its targets."""
    if teacher is None:
        return lambda _, outputs, targets: task.loss(outputs, targets)
    model = _build(teacher.task, teacher.parameters, device).eval()
    distil = partial(task.distil_loss, temperature=teacher.temperature, weight=teacher.weight)

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            taught = model(inputs)
        return distil(outputs, taught, targets)

    return loss


class _Sgd:
    """SGD with momentum and weight decay, as torch.optim.SGD computes it.

    Written out because the first use of torch.optim loads torch's compiler: a second and 100 MB
    on a small device, for four lines of arithmetic.
    """

    def __init__(self, model: nn.Module, plan: TrainingPlan) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._velocities: list[Tensor | None] = [None] * len(self._parameters)
        self._plan = plan

    @torch.no_grad()
    def __call__(self) -> None:
        """Take one step along the gradients that lie in the parameters."""
        plan = self._plan
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            step = parameter.grad
            if plan.weight_decay:
                step = step.add(parameter, alpha=plan.weight_decay)
            if plan.momentum:
                velocity = self._velocities[index]
                if velocity is None:
                    velocity = self._velocities[index] = step.clone()
                else:
                    velocity.mul_(plan.momentum).add_(step)
                step = velocity
            parameter.add_(step, alpha=-plan.learning_rate)


@contextmanager
def _own_randomness(seed: int, device: str) -> Iterator[None]:
    """Seed torch, and leave its generators afterwards as they were found."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(seed)
        yield


def _build(task: Task, parameters: Vector, device: str) -> nn.Module:
    with _own_randomness(0, device):  # weights are drawn only to be replaced
        model = task.build_model()
    load_vector(model, parameters)
    if _has_pictures(task):  # convolutions take two thirds of the time with channels last
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def _batches(rows: int, plan: TrainingPlan, rng: np.random.Generator) -> Iterator[NDArray[Any]]:
    """Yield the row numbers of each batch of all epochs; each epoch draws a new order."""
    for _ in range(plan.epochs):
        order = rng.permutation(rows)
        for start in islice(range(0, rows, plan.batch_size), plan.max_batches):
            yield order[start : start + plan.batch_size]


def _tensors(task: Task, batch: Examples, device: str) -> tuple[Tensor, Tensor]:
    """Return raw inputs as the network takes them, float32, and targets."""
    inputs = torch.tensor(batch.inputs).to(device, torch.float32)
    if _has_pictures(task):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, torch.tensor(batch.targets).to(device)


def _has_pictures(task: Task) -> bool:
    return len(task.input.shape) == 4


def _diverged(plan: TrainingPlan) -> DivergedError:
    # Said to the coordinator: not after how many examples, of which it would learn how many are.
    return DivergedError(
        f"training diverged; lower training.learning_rate (now {plan.learning_rate:g})"
    )
