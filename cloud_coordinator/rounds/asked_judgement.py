"""What a run that judges asks its devices: how good these files are on their held-out rows."""

from collections.abc import Mapping, Sequence

import msgspec

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.sum_plan import SumQuestionSpec, judge_spec
from shared.judging import Scorecard, base_of_files, check_sizes, judge_question
from shared.run_plan import RunPlan
from shared.secure_sum.config import Purpose
from shared.statistics.blocks import Floats
from shared.statistics.vectors import Answer


class AskedJudgement:
    """The question of one plan."""

    purpose: Purpose = "evaluate"

    def __init__(self, plan: RunPlan, blobs: BlobStore) -> None:
        """Read the files.

        Raises:
            ConfigError: they are more than a device takes.
            NotFoundError: one of them is gone.
        """
        assert plan.judgement is not None, "of a plan that judges"
        self._question = plan.judgement
        self._scorecard = Scorecard(plan.judgement)
        self._json = msgspec.json.encode(plan.judgement)  # the bytes that every device digests
        self._files = [blobs.read(candidate.sha256) for candidate in plan.judgement.candidates]
        sizes = [len(file) for file in self._files]
        check_sizes(plan.judgement, sizes)
        self.length = self._scorecard.length
        self.nbytes = len(self._json) + sum(sizes)

    def spec(self, plan: RunPlan) -> SumQuestionSpec:
        """Return what the signed configuration of each sum says."""
        return judge_spec(
            plan,
            length=self.length,
            norm=self._scorecard.norm,
            question_digest=judge_question(self._json),
            base_digest=base_of_files(self._question.candidates),
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
        """Send question and files; arguments and result are those of `Exchange.ask_to_train`."""
        return exchange.ask_to_judge(
            self._json,
            self._files,
            node_ids,
            round_number=round_number,
            ttl_s=ttl_s,
            configs=configs,
        )

    def read(self, total: Floats, *, sigma: float) -> Sequence[Answer]:
        """Read the sum of all scorecards, shape (d,), each number with noise of ``sigma``."""
        return self._scorecard.read(total, sigma=sigma)
