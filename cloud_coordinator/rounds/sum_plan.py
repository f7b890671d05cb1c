"""From a run's plan to the signed configuration of each of its secure sums.

Noise is calibrated to *each sum that the coordinator sees* (a group, a shard or the whole cohort),
by the honest devices that are certain to be in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cloud_coordinator.rounds.clipping import UNCLIPPED
from cloud_coordinator.rounds.robust import EXAMPLES, SEEN
from shared.privacy_plan import noise_of
from shared.run_plan import RunPlan
from shared.secure_sum.choice import choose_encoding, largest_steps
from shared.secure_sum.config import (
    Encoding,
    ExactLane,
    LaneBits,
    MaskAlgorithm,
    Noise,
    Purpose,
    SumConfig,
)

LOSS_SUM = "loss_sum"
MAX_EXAMPLES = 10**9  # that one device may claim
STATISTICS_LANE_BITS: LaneBits = 32  # few numbers, so precision costs nothing

_ROOM = 1.001  # no vector without noise is clipped for the last digits of its norm
_EXACT_BITS = 54  # of one device's value; 256 of them fit into 64 with their sign
_LARGEST_LOSS = 1e4  # of one example, while training; larger ones are shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class SumQuestionSpec:
    """What one sum is asked for."""

    purpose: Purpose
    length: int  # d of the vector; 0: exact lanes only
    exact_lanes: tuple[ExactLane, ...] = ()
    clip_norm: float | None = None  # of the vector; None: the plan's
    parts: int | None = None  # without noise: its numbers are in [-1, 1], 1/parts is whole steps
    task_digest: str
    question_digest: str
    base_digest: str | None


def training_spec(
    plan: RunPlan, *, length: int, question_digest: str, base_digest: str
) -> SumQuestionSpec:
    """Ask for updates of d parameters, and unless there is noise for what weighs them."""
    privacy = plan.privacy
    lanes = []
    if privacy.noise != "distributed":
        if privacy.weights == "examples":
            lanes.append(ExactLane(name=EXAMPLES, max_steps=privacy.max_weight))
        lanes.append(ExactLane(name=SEEN, max_steps=2**_EXACT_BITS))
        lanes.append(exact_lane(LOSS_SUM, _LARGEST_LOSS))
        if privacy.adaptive_clipping:
            lanes.append(ExactLane(name=UNCLIPPED, max_steps=1))
    return SumQuestionSpec(
        purpose="train",
        length=length,
        exact_lanes=tuple(lanes),
        task_digest=plan.task.digest,
        question_digest=question_digest,
        base_digest=base_digest,
    )


def evaluation_spec(
    plan: RunPlan, bounds: Mapping[str, float], *, question_digest: str, base_digest: str
) -> SumQuestionSpec:
    """Ask how good parameters are: exact statistics, or where there is noise scaled ones.

    Args:
        plan: of the run.
        bounds: `Task.statistics`: names, and how much of each one example may add.
        question_digest: of the question.
        base_digest: of the parameters that are measured.
    """
    noised = plan.privacy.noise == "distributed"
    lanes = () if noised else tuple(exact_lane(name, bounds[name]) for name in sorted(bounds))
    return SumQuestionSpec(
        purpose="evaluate",
        length=len(bounds) if noised else 0,
        exact_lanes=lanes,
        clip_norm=math.sqrt(len(bounds)),  # each number is in [-1, 1]
        task_digest=plan.task.digest,
        question_digest=question_digest,
        base_digest=base_digest,
    )


def statistics_spec(
    plan: RunPlan, *, length: int, norm: float, max_rows: int, question_digest: str
) -> SumQuestionSpec:
    """Ask for statistics; without noise, so that sums of rows come out whole.

    Args:
        plan: of the run.
        length: `StatisticsVector.length`.
        norm: `StatisticsVector.norm`.
        max_rows: rows that a weight of 1 stands for.
        question_digest: of the question.
    """
    noised = plan.privacy.noise == "distributed"
    return SumQuestionSpec(
        purpose="statistics",
        length=length,
        clip_norm=norm if noised else _ROOM * norm,
        parts=max_rows,
        task_digest=plan.task.digest,
        question_digest=question_digest,
        base_digest=None,
    )


def judge_spec(
    plan: RunPlan, *, length: int, norm: float, question_digest: str, base_digest: str
) -> SumQuestionSpec:
    """Ask for scorecards.

    Args:
        plan: of the run.
        length: `Scorecard.length`.
        norm: `Scorecard.norm`.
        question_digest: of the question.
        base_digest: of the files that are judged.
    """
    noised = plan.privacy.noise == "distributed"
    return SumQuestionSpec(
        purpose="evaluate",
        length=length,
        clip_norm=norm if noised else _ROOM * norm,
        task_digest=plan.task.digest,
        question_digest=question_digest,
        base_digest=base_digest,
    )


def exact_lane(name: str, bound: float) -> ExactLane:
    """Return a lane for a sum over at most `MAX_EXAMPLES` examples, each of at most ``bound``."""
    # A power of two keeps whole numbers exact.
    fraction_bits = _EXACT_BITS - math.ceil(math.log2(bound * MAX_EXAMPLES))
    return ExactLane(name=name, steps_per_unit=2.0**fraction_bits, max_steps=2**_EXACT_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOccasion:
    """Which sum of which round of which run, and what is drawn or made for it alone.

    Attributes:
        run_id: the run.
        fleet: the fleet.
        round_number: from 1.
        group: index of this sum.
        groups: sums of this round, side by side.
        session: 32 random bytes.
        server_key: public X25519 key that the reveal stage is sealed to.
        membership_version: of the signed list.
        expires_at: aware UTC.
        mask_algorithm: what all these devices are fast at.
        rotation_seed: 16 random bytes, for training with ``privacy.rotate``.
    """

    run_id: str
    fleet: str
    round_number: int
    group: int
    groups: int
    session: bytes
    server_key: bytes
    membership_version: int
    expires_at: datetime
    mask_algorithm: MaskAlgorithm
    rotation_seed: bytes


def make_config(
    plan: RunPlan,
    question: SumQuestionSpec,
    occasion: SumOccasion,
    *,
    roster_max: int,
    clip_norm: float | None = None,
) -> SumConfig:
    """Return the configuration of one sum of a run.

    Args:
        plan: of the run.
        question: what is asked.
        occasion: when it is asked, and by whom.
        roster_max: devices that are asked for this sum.
        clip_norm: of this round where clipping is adaptive; None: the plan's.

    Raises:
        ConfigError: the lanes have no room, or no device could draw such noise.
    """
    privacy, training = plan.privacy, question.purpose == "train"
    layout = plan.layout(grouped=training, roster_max=roster_max)
    noise = noise_of(privacy, layout)
    lane_bits: LaneBits = privacy.lane_bits if training else STATISTICS_LANE_BITS
    return SumConfig(
        session=occasion.session,
        fleet=occasion.fleet,
        run_id=occasion.run_id,
        round_number=occasion.round_number,
        purpose=question.purpose,
        group=occasion.group,
        groups=occasion.groups,
        task_digest=question.task_digest,
        question_digest=question.question_digest,
        base_digest=question.base_digest,
        min_survivors=layout.min_survivors,
        max_roster=layout.max_roster,
        at_least=layout.at_least,
        corrupt_fraction=layout.corrupt_fraction,
        corrupt_devices=layout.corrupt_devices,
        drop_fraction=layout.drop_fraction,
        threshold=layout.threshold,
        encoding=_encoding(
            question,
            lane_bits=lane_bits,
            clip_norm=clip_norm or question.clip_norm or privacy.clip_norm,
            max_roster=layout.max_roster,
            rotate=privacy.rotate and training,
            noise=noise,
            rotation_seed=occasion.rotation_seed,
        ),
        exact_lanes=question.exact_lanes,
        noise=noise,
        mask_algorithm=occasion.mask_algorithm,
        server_key=occasion.server_key,
        membership_version=occasion.membership_version,
        expires_at=occasion.expires_at,
    )


def _encoding(
    question: SumQuestionSpec,
    *,
    lane_bits: LaneBits,
    clip_norm: float,
    max_roster: int,
    rotate: bool,
    noise: Noise | None,
    rotation_seed: bytes,
) -> Encoding:
    if question.length == 0:
        return Encoding(
            lane_bits=lane_bits, length=0, clip_norm=clip_norm, steps_per_unit=1.0, max_steps=1
        )
    if question.parts is not None and noise is None:
        steps = largest_steps(lane_bits, max_roster) // question.parts * question.parts
        return Encoding(
            lane_bits=lane_bits,
            length=question.length,
            clip_norm=clip_norm,
            steps_per_unit=steps,
            max_steps=steps,
        )
    return choose_encoding(
        length=question.length,
        lane_bits=lane_bits,
        clip_norm=clip_norm,
        max_roster=max_roster,
        rotate=rotate,
        noise=noise,
        rotation_seed=rotation_seed,
    )
