"""Training without secrecy: each update reaches the coordinator, where the owner allows it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cloud_coordinator.rounds.aggregation import ModelState, WeightedMean
from cloud_coordinator.rounds.cohort import select_cohort, training_seed
from cloud_coordinator.rounds.collection import TTL_MARGIN_S, Collection
from cloud_coordinator.rounds.exchange import Reply
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.stage import Stage
from cloud_coordinator.rounds.teacher import teacher_of
from cloud_coordinator.rounds.trained import Groups, Trained, say_started
from shared.errors import PeerError


class PlainTraining:
    """Folds each update into a running mean as it comes, and drops it."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._host, self._roster, self._exchange = parts.host, parts.roster, parts.exchange
        self._teacher = teacher_of(parts.host)

    def eligible(self, joined: frozenset[str]) -> frozenset[str]:
        """Return all: every device may be asked."""
        return joined

    def why_not_enough(self) -> str:
        """Return nothing: others may join."""
        return ""

    def select(
        self,
        devices: frozenset[str],
        *,
        rng: np.random.Generator,
        times_selected: Mapping[str, int],
    ) -> Groups:
        """Draw one cohort."""
        plan = self._host.plan.cohort
        return {0: select_cohort(devices, plan, rng=rng, times_selected=times_selected)}

    def resume(
        self, round_number: int, state: ModelState, *, on_masked: Callable[[], None]
    ) -> Trained | None:
        """Return None: a plain round that was interrupted is repeated."""
        del round_number, state, on_masked
        return None

    def train(
        self,
        round_number: int,
        groups: Groups,
        state: ModelState,
        *,
        on_masked: Callable[[], None],
    ) -> Trained:
        """Have the cohort train, and return the mean of what came, few as they may be."""
        del on_masked  # nothing is masked
        cohort = [device for devices in groups.values() for device in devices]
        collection = self._ask(round_number, cohort, state)
        mean = WeightedMean(state.parameters.size)

        def fold(reply: Reply) -> int:
            if reply.parameters is None:
                raise PeerError("the reply to a training message holds no parameters")
            return mean.add(reply.parameters, reply.statistics)

        Stage(self._parts, round_number=round_number, name="train").run(collection, fold)
        return Trained(
            count=mean.count,
            mean=mean.mean() if mean.count else None,
            sums=dict(mean.statistics),
            participations=collection.close(self._host.seconds()),
        )

    def _ask(self, round_number: int, cohort: Sequence[str], state: ModelState) -> Collection:
        plan, host = self._host.plan.cohort, self._host
        devices = {self._roster.nodes[device]: device for device in cohort}
        message_ids = self._exchange.ask_to_train(
            state.parameters,
            host.plan.training,
            list(devices),
            round_number=round_number,
            seed=training_seed(host.plan.seed, round_number),
            min_examples=plan.min_examples,
            ttl_s=plan.round_deadline_s + TTL_MARGIN_S,
            student=host.plan.student,
            teacher=self._teacher,
        )
        say_started(host, round_number, cohort)
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
