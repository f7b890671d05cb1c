"""What a run with ``[statistics]`` asks its devices: averages over their rows.

With a probe they are over what a model makes of these rows; its file goes along.
"""

from collections.abc import Mapping, Sequence

import msgspec

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.initial_model import contract_of
from cloud_coordinator.rounds.sum_plan import SumQuestionSpec, statistics_spec
from shared.run_plan import RunPlan
from shared.secure_sum.config import Purpose
from shared.secure_sum.questions import statistics_question
from shared.statistics.blocks import Floats
from shared.statistics.probes import contract_of_probe
from shared.statistics.questions import check_question
from shared.statistics.vectors import Answer, StatisticsVector


class AskedStatistics:
    """The question of one plan."""

    purpose: Purpose = "statistics"

    def __init__(self, plan: RunPlan, blobs: BlobStore) -> None:
        """Lay out the vector.

        Raises:
            ConfigError: the task's data cannot answer.
            NotFoundError: the model that is asked about is gone.
        """
        assert plan.statistics is not None, "of a plan that asks"
        question = plan.statistics
        probe = question.probe
        contract = contract_of(plan.task) if probe is None else contract_of_probe(probe)
        check_question(question, contract)
        self._question = question
        self._vector = StatisticsVector(question, contract)
        self._json = msgspec.json.encode(question)  # the bytes that every device digests
        self._model = None if probe is None else blobs.read(probe.model_sha256)
        self.length = self._vector.length
        self.nbytes = len(self._json) + len(self._model or b"")

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
            self._json,
            node_ids,
            round_number=round_number,
            ttl_s=ttl_s,
            configs=configs,
            model=self._model,
        )

    def read(self, total: Floats, *, sigma: float) -> Sequence[Answer]:
        """Read the sum of all vectors, shape (d,), each number with noise of ``sigma``."""
        return self._vector.read(total, sigma=sigma)
