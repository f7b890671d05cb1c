"""The ServerApp: one run, from the initial model to the last committed round.

It uses Flower's public API only, and knows the process around it only as a `RunHost`. So the same
rounds run in our worker child, in Flower's simulation engine, and over stock SuperNodes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import msgspec
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from cloud_coordinator.rounds.aggregation import STRATEGIES, ModelState, WeightedMean
from cloud_coordinator.rounds.checkpoint import load_state, save_state
from cloud_coordinator.rounds.cohort import (
    can_start,
    cohort_rng,
    select_cohort,
    training_seed,
    wanted_devices,
)
from cloud_coordinator.rounds.collection import TTL_MARGIN_S, Collection
from cloud_coordinator.rounds.evaluation import Evaluation, Evaluator, patience_s
from cloud_coordinator.rounds.exchange import Exchange, Reply
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.initial_model import initial_parameters
from cloud_coordinator.rounds.lifecycle import RoundEvent, RoundState, next_state
from cloud_coordinator.rounds.roster import Roster
from cloud_coordinator.rounds.stage import Stage
from cloud_coordinator.rounds.worker_messages import (
    Participation,
    ResumePoint,
    RoundClosed,
    RoundRecord,
    RoundStarted,
    RunFailed,
    RunFinished,
    WaitingForDevices,
)
from shared.errors import PeerError, QuorumError, StoppedError

logger = logging.getLogger(__name__)

_LOOK_AROUND_S = 1.0  # while too few devices are there


def build_server_app(host: RunHost) -> ServerApp:
    """Return the app that performs ``host``'s run on whatever Grid Flower hands to it.

    It reports `RunFinished` or `RunFailed` as its last word, or nothing when it was stopped.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            host.report(TrainingRun(host, Exchange(grid)).run())
        except StoppedError as error:
            logger.info("stopped: %s", error)

    return app


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


@dataclass(slots=True)
class _Round:
    """One round while it lives."""

    number: int
    started_at: datetime
    state: RoundState = RoundState.RECRUITING
    participations: tuple[Participation, ...] = ()
    trained_s: float = 0.0  # how long training took
    training_sums: dict[str, float] = field(default_factory=dict)

    def advance(self, event: RoundEvent) -> None:
        self.state = next_state(self.state, event)
        logger.info("round %d is %s", self.number, self.state, extra={"round_number": self.number})


class TrainingRun:
    """All rounds of one life of one run."""

    def __init__(self, host: RunHost, exchange: Exchange) -> None:
        self._host = host
        self._plan = host.plan
        self._exchange = exchange
        self._roster = Roster(host, exchange)
        self._evaluator = Evaluator(host, self._roster, exchange)
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
            life = _Round(number, self._host.now())
            try:
                state = self._perform(life, state)
                committed = number
            except QuorumError as error:
                cause = self._abandon(life, error)
                if number - committed >= self._plan.cohort.max_abandoned_rounds:
                    return RunFailed(_gave_up(number - committed, cause))
        if committed == 0:
            return RunFailed("no round was committed; the records of the rounds say why")
        return RunFinished()

    def _begin(self) -> tuple[int, ModelState]:
        """Return the last committed round and its state; the first life makes round 0."""
        if (resume := self._host.resume) is not None:
            return resume.round_number, load_state(self._host.blobs, resume)
        life = _Round(0, self._host.now())
        state = ModelState(initial_parameters(self._plan.task, self._plan.seed))
        evaluation = Evaluation()
        if self._plan.evaluate:
            cohort = self._recruit(0)
            evaluation = self._evaluate(life, state, cohort)
        life.advance(RoundEvent.COHORT_FORMED)
        life.advance(RoundEvent.SUM_RECOVERED)
        self._commit(life, state, evaluation)
        return 0, state

    def _perform(self, life: _Round, state: ModelState) -> ModelState:
        """Train one round and commit it; raise QuorumError where it has to be abandoned."""
        quorum = self._plan.cohort.quorum
        cohort = self._recruit(life.number)
        if len(cohort) < quorum:
            raise QuorumError(life.number, survivors=len(cohort), quorum=quorum, of_what="devices")
        life.advance(RoundEvent.COHORT_FORMED)
        for device in cohort:
            self._times_selected[device] = self._times_selected.get(device, 0) + 1
        mean = self._collect(life, cohort, state)
        if mean.count < quorum:
            raise QuorumError(life.number, survivors=mean.count, quorum=quorum)
        life.advance(RoundEvent.SUM_RECOVERED)
        life.training_sums = dict(mean.statistics)
        following = STRATEGIES[self._plan.strategy](state, mean.mean())
        trained = [p.device_id for p in life.participations if p.outcome == "replied"]
        self._commit(life, following, self._evaluate(life, following, trained))
        return following

    def _recruit(self, number: int) -> tuple[str, ...]:
        """Wait for devices, and return the cohort: smaller than the quorum if the wait was vain."""
        plan, host, roster = self._plan.cohort, self._host, self._roster
        deadline_s = host.seconds() + plan.recruit_deadline_s
        until = host.now() + timedelta(seconds=plan.recruit_deadline_s)
        told: int | None = None
        while True:
            roster.look_around()
            joined = roster.available()
            left_s = deadline_s - host.seconds()
            if can_start(len(joined), plan, quiet_s=roster.quiet_s) or left_s <= 0:
                rng = cohort_rng(self._plan.seed, number)
                return select_cohort(joined, plan, rng=rng, times_selected=self._times_selected)
            if told != len(joined):
                told = len(joined)
                host.report(
                    WaitingForDevices(joined=told, wanted=wanted_devices(plan), until=until)
                )
            roster.wait(min(left_s, _LOOK_AROUND_S))

    def _collect(self, life: _Round, cohort: Sequence[str], state: ModelState) -> WeightedMean:
        """Have ``cohort`` train; return the running sum of the updates, few as they may be."""
        collection = self._ask_to_train(life, cohort, state)
        mean = WeightedMean(state.parameters.size)

        def fold(reply: Reply) -> int:
            if reply.parameters is None:
                raise PeerError("the reply to a training message holds no parameters")
            return mean.add(reply.parameters, reply.statistics)

        stage = Stage(
            self._host, self._roster, self._exchange, round_number=life.number, name="train"
        )
        stage.run(collection, fold)
        now_s = self._host.seconds()
        life.trained_s = now_s - collection.started_s
        life.participations = collection.close(now_s)
        return mean

    def _ask_to_train(self, life: _Round, cohort: Sequence[str], state: ModelState) -> Collection:
        plan, host = self._plan.cohort, self._host
        devices = {self._roster.nodes[device]: device for device in cohort}
        message_ids = self._exchange.ask_to_train(
            state.parameters,
            self._plan.training,
            list(devices),
            round_number=life.number,
            seed=training_seed(self._plan.seed, life.number),
            min_examples=plan.min_examples,
            ttl_s=plan.round_deadline_s + TTL_MARGIN_S,
        )
        host.report(
            RoundStarted(
                round_number=life.number,
                cohort=tuple(cohort),
                deadline_at=host.now() + timedelta(seconds=plan.round_deadline_s),
            )
        )
        started_s = host.seconds()
        return Collection(
            cohort,
            {devices[node]: message_id for node, message_id in message_ids.items()},
            wanted=plan.size,
            needed=plan.quorum,
            started_s=started_s,
            deadline_s=started_s + plan.round_deadline_s,
            bytes_down=state.parameters.nbytes,
        )

    def _evaluate(self, life: _Round, state: ModelState, devices: Sequence[str]) -> Evaluation:
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

    def _commit(self, life: _Round, state: ModelState, evaluation: Evaluation) -> None:
        result = save_state(self._host.blobs, state, round_number=life.number)
        self._close(life, cause=evaluation.cause, metrics=evaluation.metrics, result=result)

    def _abandon(self, life: _Round, error: QuorumError) -> str:
        """Close the round without a result; return the cause, for people."""
        life.advance(RoundEvent.QUORUM_LOST)
        lost = [
            f"{part.device_id}: {part.cause}"
            for part in life.participations
            if part.outcome not in {"replied", "not-needed"}
        ]
        cause = f"{error} ({'; '.join(lost)})"[:500] if lost else str(error)
        self._close(life, cause=cause)
        return cause

    def _close(
        self,
        life: _Round,
        *,
        cause: str,
        metrics: dict[str, float] | None = None,
        result: ResumePoint | None = None,
    ) -> None:
        """Report the round and wait until its record is durable."""
        assert life.state in {RoundState.COMMITTED, RoundState.ABANDONED}
        record = RoundRecord(
            round_number=life.number,
            state="committed" if life.state is RoundState.COMMITTED else "abandoned",
            cause=cause,
            started_at=life.started_at,
            closed_at=self._host.now(),
            participations=life.participations,
            metrics=metrics or {},
            training_sums=life.training_sums,
            parameters_sha256=result.parameters_sha256 if result else None,
            optimizer_sha256=result.optimizer_sha256 if result else None,
        )
        self._host.report(RoundClosed(record))
        self._roster.wait_until_saved(life.number)


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
