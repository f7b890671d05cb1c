"""Training by secure sums: of each group the coordinator learns one number per parameter, no more.

A device that sent its vector for a model sends no other one for it (security: the difference of
two sums would be its update). So devices that say so are not asked again until the model has moved
on, and neither are those that broke the protocol, until the run ends.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from cloud_coordinator.rounds.aggregation import ModelState
from cloud_coordinator.rounds.clipping import (
    UNCLIPPED,
    add_central_noise,
    central_sigma,
    mean_multiplier,
    next_clip_norm,
    noised_count,
)
from cloud_coordinator.rounds.cohort import select_cohort, training_seed
from cloud_coordinator.rounds.exchange import encode_plan
from cloud_coordinator.rounds.groups import draw_groups, present_groups, select_groups
from cloud_coordinator.rounds.robust import Combiner, mean_of
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.secrecy import secrecy_of
from cloud_coordinator.rounds.secure_sums import SecureSums
from cloud_coordinator.rounds.sum_plan import (
    SumOccasion,
    SumQuestionSpec,
    make_config,
    training_spec,
)
from cloud_coordinator.rounds.sum_session import GroupSum
from cloud_coordinator.rounds.sum_work import Configure, SumOutcome, SumQuestion
from cloud_coordinator.rounds.teacher import teacher_of
from cloud_coordinator.rounds.trained import Groups, Trained, say_started
from shared.errors import PeerError, QuorumError
from shared.secure_sum.config import SumConfig
from shared.secure_sum.masking import choose_algorithm
from shared.secure_sum.questions import base_digest_of, training_question
from shared.student_plan import encode_student

logger = logging.getLogger(__name__)

_CLIP_NORM = "clip_norm"  # its name in the model's state, where clipping is adaptive
_LATER_STAGES = 4  # each with a deadline of its own
_SPARE_S = 60.0  # for what lies between stages


class SecureTraining:
    """Has cohorts train, and knows only sums of their updates."""

    def __init__(self, parts: RunParts, sums: SecureSums) -> None:
        self._parts, self._host, self._sums = parts, parts.host, sums
        self._groups = parts.scratch.load_groups("train")
        self._blamed: dict[str, str] = {}
        self._spent: frozenset[str] = frozenset()  # they sent a vector for the model as it is
        self._base = ""
        self._teacher = teacher_of(parts.host)

    def eligible(self, joined: frozenset[str]) -> frozenset[str]:
        """Return those who may be in a sum for the model as it is."""
        if self._host.announces:
            joined &= self._parts.roster.members.keys()
        return joined - self._blamed.keys() - self._spent

    def why_not_enough(self) -> str:
        """Return why no further sum for this model can be made; empty while one may be."""
        if not self._spent:
            return ""
        return (
            f"{len(self._spent)} devices have sent their update for this model and may send no "
            "other one, and too few others are here; start a new run"
        )

    def select(
        self,
        devices: frozenset[str],
        *,
        rng: np.random.Generator,
        times_selected: Mapping[str, int],
    ) -> Groups:
        """Draw one cohort; or groups, which stay as they are for the whole run."""
        plan, layout = self._host.plan, self._host.plan.layout()
        if layout.groups == 1:
            return {0: select_cohort(devices, plan.cohort, rng=rng, times_selected=times_selected)}
        groups = draw_groups(devices, layout, rng=rng, drawn=self._groups)
        if groups != self._groups:
            self._parts.scratch.save_groups("train", groups)
            self._groups = groups
        here = present_groups(groups, devices, layout)
        turns = {
            number: min(times_selected.get(device, 0) for device in ids)
            for number, ids in here.items()
        }
        return select_groups(here, layout, rng=rng, times_selected=turns)

    def resume(
        self, round_number: int, state: ModelState, *, on_masked: Callable[[], None]
    ) -> Trained | None:
        """Finish the sum that an earlier life of the worker left; None where it left none."""
        outcome = self._sums.resume("train", round_number, on_masked=on_masked)
        return None if outcome is None else self._trained(round_number, state, outcome)

    def train(
        self,
        round_number: int,
        groups: Groups,
        state: ModelState,
        *,
        on_masked: Callable[[], None],
    ) -> Trained:
        """Have the groups train, and return the mean of what their sums give."""
        plan = self._host.plan
        record = encode_plan(plan.training)
        base = base_digest_of(state.parameters)
        spec = training_spec(
            plan,
            length=state.parameters.size,
            question_digest=training_question(record, encode_student(plan.student)),
            base_digest=base,
        )
        if base != self._base:
            self._base, self._spent = base, frozenset()
        timeout_s = plan.cohort.round_deadline_s
        layout = plan.layout()
        question = SumQuestion(
            purpose="train",
            round_number=round_number,
            stage="train",
            configure=configurer(
                self._parts,
                spec,
                round_number=round_number,
                groups=len(groups),
                most=layout.wanted,
                timeout_s=timeout_s,
                clip_norm=self._clip_norm(state),
            ),
            push=lambda configs, ttl_s: self._push(round_number, groups, state, configs, ttl_s),
            wanted=layout.wanted,
            timeout_s=timeout_s,
            bytes_down=state.parameters.nbytes,
        )
        outcome = self._sums.run(question, groups, on_masked=on_masked)
        return self._trained(round_number, state, outcome)

    def _push(
        self,
        round_number: int,
        groups: Groups,
        state: ModelState,
        configs: Mapping[int, bytes],
        ttl_s: float,
    ) -> dict[int, str]:
        plan = self._host.plan
        message_ids = self._parts.exchange.ask_to_train(
            state.parameters,
            plan.training,
            list(configs),
            round_number=round_number,
            seed=training_seed(plan.seed, round_number),
            min_examples=plan.cohort.min_examples,
            ttl_s=ttl_s,
            configs=configs,
            student=plan.student,
            teacher=self._teacher,
        )
        cohort = [device for devices in groups.values() for device in devices]
        say_started(self._host, round_number, cohort)
        return message_ids

    # --- from sums to the mean -------------------------------------------------------------------

    def _trained(self, round_number: int, state: ModelState, outcome: SumOutcome) -> Trained:
        self._blamed |= outcome.blamed
        self._spent |= outcome.spent
        plan = self._host.plan
        combiner = Combiner(
            plan.aggregation, groups=plan.layout().groups, round_number=round_number
        )
        causes: dict[int, str] = {}
        sums: dict[str, float] = {}
        for group in outcome.groups:
            try:
                causes[group.group] = self._add(combiner, sums, group)
            except PeerError as error:
                logger.warning("round %d: %s", round_number, error)
                causes[group.group] = str(error)
        cause = "; ".join(filter(None, causes.values()))
        secrecy = secrecy_of(plan.privacy, outcome, causes)
        try:
            mean: NDArray[np.float64] | None = combiner.result()
        except QuorumError as error:
            mean, cause = None, cause or str(error)
        memory: dict[str, NDArray[np.float64]] = {}
        if mean is not None:
            mean, memory = self._finished(mean, sums, outcome, state, combiner.count)
        return Trained(
            count=combiner.count if mean is not None else 0,
            mean=mean,
            sums=sums,
            participations=outcome.participations,
            cause=cause,
            memory=memory,
            secrecy=secrecy,
        )

    def _add(self, combiner: Combiner, sums: dict[str, float], group: GroupSum) -> str:
        """Take in one group's sum; return why there is none."""
        if group.cause:
            return group.cause
        total, exact = group.decoded()
        combiner.add(
            mean_of(group.config, total, exact, count=group.survivors), count=group.survivors
        )
        for name, value in exact.items():
            sums[name] = sums.get(name, 0.0) + value
        return ""

    def _finished(
        self,
        mean: NDArray[np.float64],
        sums: dict[str, float],
        outcome: SumOutcome,
        state: ModelState,
        count: int,
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Add central noise, move the clip norm, and return the mean of the devices' parameters."""
        privacy = self._host.plan.privacy
        config = next(group.config for group in outcome.groups if not group.cause)
        rng = np.random.default_rng(int.from_bytes(self._parts.entropy(32)))
        central = privacy.noise == "central"
        unclipped = sums.pop(UNCLIPPED, 0.0)
        if central:
            multiplier = mean_multiplier(
                privacy.noise_multiplier, count, adaptive=privacy.adaptive_clipping
            )
            mean = add_central_noise(mean, central_sigma(config, multiplier, count=count), rng)
        memory: dict[str, NDArray[np.float64]] = {}
        if privacy.adaptive_clipping:
            if central:
                unclipped = noised_count(unclipped, count, privacy.noise_multiplier, rng)
            moved = next_clip_norm(
                config.encoding.clip_norm,
                unclipped=unclipped,
                count=count,
                target=privacy.target_unclipped,
                learning_rate=privacy.clip_learning_rate,
            )
            memory[_CLIP_NORM] = np.array([moved])
        return state.parameters.astype(np.float64) + mean, memory

    def _clip_norm(self, state: ModelState) -> float | None:
        kept = state.optimizer.get(_CLIP_NORM)
        return None if kept is None else float(kept[0])


def configurer(
    parts: RunParts,
    spec: SumQuestionSpec,
    *,
    round_number: int,
    groups: int,
    most: int,
    timeout_s: float,
    clip_norm: float | None = None,
) -> Configure:
    """Return what makes the configuration of each group's sum.

    Args:
        parts: of the run.
        spec: what is asked.
        round_number: of the round.
        groups: sums side by side.
        most: devices that one sum may hold.
        timeout_s: of the first stage.
        clip_norm: of this round; None: the plan's.
    """
    host, plan, rotation_seed = parts.host, parts.host.plan, parts.entropy(16)
    # Long enough to be resumed by the next life of a worker that dies at the very end.
    later_s = _LATER_STAGES * plan.privacy.stage_deadline_s + plan.cohort.recruit_deadline_s
    expires_at: datetime = host.now() + timedelta(seconds=timeout_s + 2 * later_s + _SPARE_S)

    def configure(group: int, session: bytes, server_key: bytes, devices: int) -> SumConfig:
        occasion = SumOccasion(
            run_id=host.run_id,
            fleet=host.fleet,
            round_number=round_number,
            group=group,
            groups=groups,
            session=session,
            server_key=server_key,
            membership_version=parts.roster.membership_version,
            expires_at=expires_at,
            mask_algorithm=choose_algorithm(),
            rotation_seed=rotation_seed,
        )
        return make_config(plan, spec, occasion, roster_max=min(most, devices), clip_norm=clip_norm)

    return configure
