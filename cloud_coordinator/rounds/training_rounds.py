"""The ServerApp: one run, from the initial model to the last committed round.

It uses Flower's public API only, and knows the process around it only as a `RunHost`. So the same
rounds run in our worker child, in Flower's simulation engine, and over stock SuperNodes.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import msgspec
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from cloud_coordinator.rounds.aggregation import STRATEGIES, ModelState
from cloud_coordinator.rounds.asked_judgement import AskedJudgement
from cloud_coordinator.rounds.asked_statistics import AskedStatistics
from cloud_coordinator.rounds.asking_run import AskingRun
from cloud_coordinator.rounds.checkpoint import load_state, save_state
from cloud_coordinator.rounds.cohort import cohort_rng
from cloud_coordinator.rounds.evaluation import Evaluates, Evaluation, Evaluator, patience_s
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.initial_model import check_student, initial_parameters
from cloud_coordinator.rounds.lifecycle import RoundEvent
from cloud_coordinator.rounds.plain_training import PlainTraining
from cloud_coordinator.rounds.run_parts import (
    RoundLife,
    RunParts,
    abandon_round,
    close_round,
)
from cloud_coordinator.rounds.secure_evaluation import SecureEvaluator
from cloud_coordinator.rounds.secure_sums import SecureSums
from cloud_coordinator.rounds.secure_training import SecureTraining
from cloud_coordinator.rounds.trained import Groups, Trained, Training
from cloud_coordinator.rounds.waiting import wait_for_devices
from cloud_coordinator.rounds.worker_messages import (
    Participation,
    RunFailed,
    RunFinished,
)
from shared.errors import QuorumError, StoppedError

logger = logging.getLogger(__name__)


def build_server_app(host: RunHost) -> ServerApp:
    """Return the app that performs ``host``'s run on whatever Grid Flower hands to it.

    It reports `RunFinished` or `RunFailed` as its last word, or nothing when it was stopped.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            host.report(_run_of(host, Exchange(grid)).run())
        except StoppedError as error:
            logger.info("stopped: %s", error)

    return app


def _run_of(host: RunHost, exchange: Exchange) -> "AskingRun | TrainingRun":
    if host.plan.statistics is not None:
        return AskingRun(host, exchange, AskedStatistics(host.plan, host.blobs))
    if host.plan.judgement is not None:
        return AskingRun(host, exchange, AskedJudgement(host.plan, host.blobs))
    return TrainingRun(host, exchange)


def perform_run(host: RunHost, grid: Grid) -> None:
    """Run the app of `build_server_app` in this thread, as Flower does.

    Raises:
        UnavailableError: what the run needs is gone for now; it can go on from what was saved.
        ShoalError: anything else that prevents the run.
    """
    context = Context(
        run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config={}
    )
    build_server_app(host)(grid, context)


class TrainingRun:
    """All rounds of one life of one run."""

    def __init__(self, host: RunHost, exchange: Exchange) -> None:
        self._host, self._plan = host, host.plan
        self._parts = RunParts.of(host, exchange)
        self._training, self._evaluator = _work_of(self._parts)
        self._times_selected = dict(host.times_selected)

    def run(self) -> RunFinished | RunFailed:
        """Perform the rounds that are left; each is saved before the next starts.

        Raises:
            StoppedError: the run was ended from outside.
            UnavailableError: the SuperLink, the coordinator or disk space is gone; the run can go
                on from what was saved.
        """
        committed, state = self._begin()
        for number in range(max(1, self._host.next_round), self._plan.rounds + 1):
            life = RoundLife(number, self._host.now())
            try:
                state = self._perform(life, state)
                committed = number
            except QuorumError as error:
                cause = abandon_round(self._parts, life, error)
                if life.is_hopeless:
                    return RunFailed(self._training.why_not_enough())
                if number - committed >= self._plan.cohort.max_abandoned_rounds:
                    return RunFailed(_gave_up(number - committed, cause))
        if committed == 0:
            return RunFailed("no round was committed; the records of the rounds say why")
        return RunFinished()

    def _begin(self) -> tuple[int, ModelState]:
        """Return the last committed round and its state; the first life makes round 0."""
        if (resume := self._host.resume) is not None:
            return resume.round_number, load_state(self._host.blobs, resume)
        life = RoundLife(0, self._host.now())
        plan = self._plan
        if plan.compression is not None and plan.compression.distil is not None:
            check_student(plan.task, plan.compression.distil.student)  # before anybody trains
        student = plan.student.network if plan.student is not None else ""
        state = ModelState(initial_parameters(plan.task, plan.seed, student=student))
        evaluation = Evaluation()
        if self._plan.evaluate:
            groups = self._recruit(0)
            cohort = [device for devices in groups.values() for device in devices]
            evaluation = self._evaluate(life, state, cohort)
        life.advance(RoundEvent.COHORT_FORMED)
        life.advance(RoundEvent.SUM_RECOVERED)
        self._commit(life, state, evaluation)
        return 0, state

    def _perform(self, life: RoundLife, state: ModelState) -> ModelState:
        """Train one round and commit it; raise QuorumError where it has to be abandoned."""
        quorum = self._plan.cohort.quorum
        trained = self._train(life, state)
        life.participations, life.cause = trained.participations, trained.cause
        life.secrecy = trained.secrecy
        if trained.mean is None or trained.count < quorum:
            raise QuorumError(life.number, survivors=trained.count, quorum=quorum)
        life.advance(RoundEvent.SUM_RECOVERED)
        life.training_sums = dict(trained.sums)
        following = STRATEGIES[self._plan.strategy](state, trained.mean)
        if trained.memory:
            following = replace(following, optimizer={**following.optimizer, **trained.memory})
        devices = [p.device_id for p in life.participations if p.outcome == "replied"]
        self._commit(life, following, self._evaluate(life, following, devices))
        return following

    def _train(self, life: RoundLife, state: ModelState) -> Trained:
        """Have a cohort train, or finish what an earlier life of this worker began."""
        masked = partial(life.advance, RoundEvent.COLLECTION_CLOSED)
        if self._parts.scratch.load("train", life.number) is not None:
            life.advance(RoundEvent.COHORT_FORMED)
            if trained := self._training.resume(life.number, state, on_masked=masked):
                return trained
        groups = self._recruit(life.number)
        cohort = [device for devices in groups.values() for device in devices]
        quorum = self._plan.cohort.quorum
        if len(cohort) < quorum:
            life.is_hopeless = bool(self._training.why_not_enough())
            raise QuorumError(life.number, survivors=len(cohort), quorum=quorum, of_what="devices")
        life.advance(RoundEvent.COHORT_FORMED)
        for device in cohort:
            self._times_selected[device] = self._times_selected.get(device, 0) + 1
        began_s = self._host.seconds()
        trained = self._training.train(life.number, groups, state, on_masked=masked)
        life.trained_s = self._host.seconds() - began_s
        return trained

    def _recruit(self, number: int) -> Groups:
        """Wait for devices, and return who is asked: fewer than the quorum if the wait was vain."""
        joined = wait_for_devices(self._parts, self._training.eligible)
        rng = cohort_rng(self._plan.seed, number)
        return self._training.select(joined, rng=rng, times_selected=self._times_selected)

    def _evaluate(self, life: RoundLife, state: ModelState, devices: Sequence[str]) -> Evaluation:
        if not self._plan.evaluate:
            return Evaluation()
        evaluation = self._evaluator.measure(
            state.parameters,
            devices,
            round_number=life.number,
            timeout_s=patience_s(self._plan.cohort.round_deadline_s, life.trained_s),
        )
        life.participations = _with_downloads(life.participations, evaluation.participations)
        return evaluation

    def _commit(self, life: RoundLife, state: ModelState, evaluation: Evaluation) -> None:
        result = save_state(self._host.blobs, state, round_number=life.number)
        cause = "; ".join(filter(None, (life.cause, evaluation.cause)))
        close_round(self._parts, life, cause=cause, metrics=evaluation.metrics, result=result)


def _work_of(parts: RunParts) -> tuple[Training, Evaluates]:
    """Return what trains and what measures, by sums alone unless the plan says otherwise."""
    if parts.host.plan.privacy.mode == "plain":
        return PlainTraining(parts), Evaluator(parts)
    sums = SecureSums(parts)
    return SecureTraining(parts, sums), SecureEvaluator(parts, sums)


def _with_downloads(
    trained: Sequence[Participation], measured: Sequence[Participation]
) -> tuple[Participation, ...]:
    """Add to each device's part what it downloaded to measure the result."""
    more = {part.device_id: part.bytes_down for part in measured}
    return tuple(
        msgspec.structs.replace(part, bytes_down=part.bytes_down + more.get(part.device_id, 0))
        for part in trained
    )


def _gave_up(rounds: int, cause: str) -> str:
    return (
        f"{rounds} rounds in a row were abandoned, the last because {cause}; "
        "start the run again when more devices can take part"
    )
