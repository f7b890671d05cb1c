"""Measures parameters by secure sums; failing to measure never costs a round."""

from collections.abc import Mapping, Sequence

import numpy as np

from cloud_coordinator.rounds.aggregation import EXAMPLES
from cloud_coordinator.rounds.evaluation import Evaluation, measured, measured_student
from cloud_coordinator.rounds.groups import draw_groups, present_groups
from cloud_coordinator.rounds.initial_model import statistic_bounds
from cloud_coordinator.rounds.robust import check_sum
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.secure_sums import SecureSums
from cloud_coordinator.rounds.secure_training import configurer
from cloud_coordinator.rounds.sum_plan import evaluation_spec
from cloud_coordinator.rounds.sum_session import GroupSum
from cloud_coordinator.rounds.sum_work import SumOutcome, SumQuestion
from cloud_coordinator.rounds.trained import Groups
from shared.errors import PeerError
from shared.parameters import Vector
from shared.secure_sum.questions import base_digest_of, evaluation_question
from shared.student_plan import encode_student
from shared.tasks.metrics import restore_statistics


class SecureEvaluator:
    """Has devices measure, and learns only the sums of what they found."""

    def __init__(self, parts: RunParts, sums: SecureSums) -> None:
        self._parts, self._host, self._sums = parts, parts.host, sums

    def measure(
        self, parameters: Vector, cohort: Sequence[str], *, round_number: int, timeout_s: float
    ) -> Evaluation:
        """Ask those of ``cohort`` who are still there, and turn the sum of it into metrics.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink is gone.
        """
        base = base_digest_of(parameters)
        outcome = self._sums.resume("evaluate", round_number)
        if outcome is None:
            groups = self._groups(cohort)
            if not groups:
                return Evaluation(cause="not measured: too few devices were there for a sum")
            question = self._question(parameters, base, groups, round_number, timeout_s=timeout_s)
            outcome = self._sums.run(question, groups)
        return self._evaluated(outcome, base)

    def _groups(self, cohort: Sequence[str]) -> Groups:
        """Return one sum of all where they fit into it, else shards that stay as they are."""
        layout = self._host.plan.layout(grouped=False)
        here = [device for device in cohort if device in self._parts.roster.nodes]
        if layout.groups == 1:
            fewest = self._host.plan.layout(grouped=False, roster_max=max(2, len(here)))
            return {0: here} if len(here) >= fewest.min_survivors else {}
        rng = np.random.default_rng(int.from_bytes(self._parts.entropy(32)))
        drawn = draw_groups(
            here, layout, rng=rng, drawn=self._parts.scratch.load_groups("evaluate")
        )
        self._parts.scratch.save_groups("evaluate", drawn)
        return present_groups(drawn, here, layout)

    def _question(
        self,
        parameters: Vector,
        base: str,
        groups: Groups,
        round_number: int,
        *,
        timeout_s: float,
    ) -> SumQuestion:
        student = measured_student(self._host.plan.student)
        spec = evaluation_spec(
            self._host.plan,
            statistic_bounds(self._host.plan.task),
            question_digest=evaluation_question(encode_student(student)),
            base_digest=base,
        )
        most = max(len(devices) for devices in groups.values())

        def push(configs: Mapping[int, bytes], ttl_s: float) -> dict[int, str]:
            return self._parts.exchange.ask_to_evaluate(
                parameters,
                list(configs),
                round_number=round_number,
                ttl_s=ttl_s,
                configs=configs,
                student=student,
            )

        return SumQuestion(
            purpose="evaluate",
            round_number=round_number,
            stage="evaluate",
            configure=configurer(
                self._parts,
                spec,
                round_number=round_number,
                groups=len(groups),
                most=most,
                timeout_s=timeout_s,
            ),
            push=push,
            wanted=most,
            timeout_s=timeout_s,
            bytes_down=parameters.nbytes,
        )

    def _evaluated(self, outcome: SumOutcome, base: str) -> Evaluation:
        parts, sums = outcome.participations, dict[str, float]()
        causes = [group.cause for group in outcome.groups if group.cause]
        for group in outcome.groups:
            try:
                self._add(sums, group, base)
            except PeerError as error:
                causes.append(str(error))
        if not sums and causes:
            return Evaluation(
                cause=f"not measured: {'; '.join(causes)[:300]}", participations=parts
            )
        return measured(self._host.plan, sums, parts)

    def _add(self, sums: dict[str, float], group: GroupSum, base: str) -> None:
        if group.cause:
            return
        if group.config.base_digest != base:  # central noise: the resumed round gave another model
            raise PeerError("what was measured before the interruption was another model")
        total, exact = group.decoded()
        check_sum(group.config, total, exact, group.survivors)
        if total.size:
            exact = restore_statistics(total, statistic_bounds(self._host.plan.task))
            exact[EXAMPLES] = float(group.survivors)  # each counts as one
        for name, value in exact.items():
            sums[name] = sums.get(name, 0.0) + value
