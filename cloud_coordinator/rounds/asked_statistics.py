"""What a run with ``[statistics]`` asks its devices: averages over their rows."""

from collections.abc import Mapping, Sequence

import msgspec

from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.initial_model import contract_of
from cloud_coordinator.rounds.sum_plan import SumQuestionSpec, statistics_spec
from shared.run_plan import RunPlan
from shared.secure_sum.config import Purpose
from shared.secure_sum.questions import statistics_question
from shared.statistics.blocks import Floats
from shared.statistics.questions import check_question
from shared.statistics.vectors import Answer, StatisticsVector


class AskedStatistics:
    """The question of one plan."""

    purpose: Purpose = "statistics"

    def __init__(self, plan: RunPlan) -> None:
        """Lay out the vector; raise ConfigError where the task's data cannot answer."""
        assert plan.statistics is not None, "of a plan that asks"
        contract = contract_of(plan.task)
        check_question(plan.statistics, contract)
        self._question = plan.statistics
        self._vector = StatisticsVector(plan.statistics, contract)
        self._json = msgspec.json.encode(plan.statistics)  # the bytes that every device digests
        self.length, self.nbytes = self._vector.length, len(self._json)

    def spec(self, plan: RunPlan) -> SumQuestionSpec:
        """Return what the signed configuration of each sum says."""
        return statistics_spec(
            plan,
            length=self.length,
            norm=self._vector.norm,
            max_rows=self._question.max_rows,
            question_digest=statistics_question(self._json),
        )

    def push(
        self,
        exchange: Exchange,
        node_ids: Sequence[int],
        *,
        round_number: int,
        ttl_s: float,
        configs: Mapping[int, bytes],
    ) -> dict[int, str]:
        """Send the question; arguments and result are those of `Exchange.ask_to_train`."""
        return exchange.ask_for_statistics(
            self._json, node_ids, round_number=round_number, ttl_s=ttl_s, configs=configs
        )

    def read(self, total: Floats, *, sigma: float) -> Sequence[Answer]:
        """Read the sum of all vectors, shape (d,), each number with noise of ``sigma``."""
        return self._vector.read(total, sigma=sigma)
