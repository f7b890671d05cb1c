"""Measures parameters on the held-out rows of devices. Failing to measure never costs a round."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cloud_coordinator.rounds.aggregation import EXAMPLES, AddedStatistics
from cloud_coordinator.rounds.collection import TTL_MARGIN_S, Collection
from cloud_coordinator.rounds.exchange import Reply
from cloud_coordinator.rounds.initial_model import score, summarize
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.stage import Stage
from cloud_coordinator.rounds.worker_messages import Participation
from shared.parameters import Vector
from shared.run_plan import RunPlan
from shared.student_plan import SCORE, StudentPlan

logger = logging.getLogger(__name__)

_SHORTEST_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the devices measured together."""

    metrics: dict[str, float] = field(default_factory=dict)
    cause: str = ""  # why there are no metrics
    participations: tuple[Participation, ...] = ()


def patience_s(round_deadline_s: float, trained_s: float) -> float:
    """Return how long measuring may take: as long as training did, and a minute at least."""
    return min(round_deadline_s, max(_SHORTEST_PATIENCE_S, trained_s))


class Evaluates(Protocol):
    """Has devices measure, for the rounds of one run."""

    def measure(
        self, parameters: Vector, cohort: Sequence[str], *, round_number: int, timeout_s: float
    ) -> Evaluation:
        """Ask those of ``cohort`` who are still there, and turn the sum of it into metrics.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink is gone.
        """
        ...


class Evaluator:
    """Adds up what each device measured, which reaches the coordinator one by one."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._host, self._roster, self._exchange = parts.host, parts.roster, parts.exchange

    def measure(
        self, parameters: Vector, cohort: Sequence[str], *, round_number: int, timeout_s: float
    ) -> Evaluation:
        """Ask those of ``cohort`` who are still there, and turn the sum of it into metrics.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink is gone.
        """
        present = [device for device in cohort if device in self._roster.nodes]
        if not present:
            return Evaluation(cause="not measured: no device was there to do it")
        added = AddedStatistics()

        def fold(reply: Reply) -> int:
            added.add(reply.statistics)
            return int(reply.statistics[EXAMPLES])

        collection = self._ask(parameters, present, round_number, timeout_s)
        Stage(self._parts, round_number=round_number, name="evaluate").run(collection, fold)
        participations = collection.close(self._host.seconds())
        return measured(self._host.plan, added.sums, participations)

    def _ask(
        self, parameters: Vector, present: Sequence[str], round_number: int, timeout_s: float
    ) -> Collection:
        devices = {self._roster.nodes[device]: device for device in present}
        message_ids = self._exchange.ask_to_evaluate(
            parameters,
            list(devices),
            round_number=round_number,
            ttl_s=timeout_s + TTL_MARGIN_S,
            student=measured_student(self._host.plan.student),
        )
        started_s = self._host.seconds()
        return Collection(
            present,
            {devices[node]: message_id for node, message_id in message_ids.items()},
            wanted=len(present),
            needed=0,
            started_s=started_s,
            deadline_s=started_s + timeout_s,
            bytes_down=parameters.nbytes,
        )


def measured_student(student: StudentPlan | None) -> StudentPlan | None:
    """Return what a device must know of a student to measure it: not whom it learned from."""
    return None if student is None else StudentPlan(network=student.network)


def metrics_of(plan: RunPlan, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the task's metrics, or none where its code fails on what the devices sent.

    Students are compared, so they have a ``score`` besides, which every task has.
    """
    try:
        metrics = dict(summarize(plan.task, sums))
        if plan.student is not None:
            metrics[SCORE] = score(plan.task, sums)
    except Exception:
        logger.exception("the task cannot sum up %s", sorted(sums))
        return {}
    # Infinity and NaN would not survive JSON.
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def measured(
    plan: RunPlan, sums: Mapping[str, float], participations: tuple[Participation, ...]
) -> Evaluation:
    """Return what added statistics say, or that they say nothing."""
    if not sums.get(EXAMPLES):
        return Evaluation(cause=_why_unmeasured(participations), participations=participations)
    metrics = metrics_of(plan, sums)
    cause = "" if metrics else "not measured: the task cannot sum up what the devices said"
    return Evaluation(metrics, cause, participations)


def _why_unmeasured(participations: Sequence[Participation]) -> str:
    causes = {p.cause for p in participations if p.cause} or {"no device holds rows out"}
    return f"not measured: {'; '.join(sorted(causes))[:300]}"
