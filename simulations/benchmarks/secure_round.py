"""One secure round over real transports, timed from the push of its first stage to the exact sum.

Devices are lost as by a crash: their connection breaks in the moment in which they are asked, and
they say nothing any more. The sum must be, lane by lane, that of the survivors' plain encodings.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from cloud_coordinator.rounds.exchange import Exchange, encode_plan
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.secure_sums import SecureSums
from cloud_coordinator.rounds.secure_training import configurer
from cloud_coordinator.rounds.sum_plan import training_spec
from cloud_coordinator.rounds.sum_session import GroupSum
from cloud_coordinator.rounds.sum_work import SumOutcome, SumQuestion
from shared.parameters import Vector
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.secure_sum.lane_shape import empty_lanes
from shared.secure_sum.messages import Stage
from shared.secure_sum.questions import base_digest_of, training_question
from simulations.benchmarks.light_sums import drawn_lanes
from simulations.benchmarks.probe_apps import TASK
from simulations.benchmarks.report import Row, row_at_most
from simulations.benchmarks.secure_fleet import SecureFleet, secure_fleet

logger = logging.getLogger(__name__)
STAGES: tuple[Stage, ...] = ("advertise", "share", "mask", "consent", "reveal")
_ROUND_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What is summed by whom."""

    devices: int
    lost: int
    length: int = 100_000  # d
    at_least: int = 16

    def plan(self) -> RunPlan:
        """Return the plan of a run with such rounds: the defaults, but for the devices."""
        return RunPlan(
            name="bench",
            task=TASK,
            cohort=CohortPlan(size=self.devices, round_deadline_s=_ROUND_DEADLINE_S),
            privacy=PrivacyPlan(at_least=self.at_least),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one round took."""

    seconds: float
    stage_seconds: Mapping[str, float]
    survivors: int
    protocol_s: float = 0.0  # processor time of all devices within the protocol
    processor_s: float = 0.0  # of the devices' processes


def secure_rounds(setting: Setting, *, repeats: int, seed: int = 0) -> list[Measured]:
    """Perform ``repeats`` rounds after one that warms up.

    Args:
        setting: how many devices, and how many of them are lost in each round.
        repeats: rounds.
        seed: of who is lost, and when.

    Raises:
        AssertionError: a sum is missing, or not the sum of the survivors' encodings.
        UnavailableError: a part did not come up.
    """
    rng = np.random.default_rng(seed)
    parameters = rng.normal(0, 0.01, setting.length).astype(np.float32)
    with secure_fleet(setting.plan(), setting.devices) as fleet, fleet.run() as grid:
        parts = RunParts.of(fleet, Exchange(grid))
        roster, sums = parts.roster, SecureSums(parts)
        measured, spent = [], fleet.begin_round(1, lost := _draw_lost(setting, fleet, rng))
        for number in range(1, repeats + 2):
            while len(roster.nodes) < setting.devices:
                roster.wait(1.0)
            question = _question(parts, parameters, number)
            begun = time.perf_counter()
            outcome = sums.run(question, {0: list(fleet.device_ids)})
            seconds = time.perf_counter() - begun
            _check(fleet, outcome, lost)
            parts.scratch.forget_sums()
            before, spent = (
                spent,
                fleet.begin_round(number + 1, lost := _draw_lost(setting, fleet, rng)),
            )
            measured.append(
                Measured(
                    seconds=seconds,
                    stage_seconds=outcome.stage_seconds,
                    survivors=outcome.groups[0].survivors,
                    protocol_s=spent.protocol_s - before.protocol_s,
                    processor_s=spent.processor_s - before.processor_s,
                )
            )
            logger.info("%s", measured[-1])
    return measured[1:]


def _draw_lost(setting: Setting, fleet: SecureFleet, rng: np.random.Generator) -> dict[str, Stage]:
    """Draw who is lost at which stage; some always after their vector was sent."""
    lost = rng.choice(fleet.device_ids, setting.lost, replace=False).tolist()
    stages = [STAGES[int(rng.integers(len(STAGES)))] for _ in lost]
    if stages:
        stages[0] = "consent"
    return dict(zip(lost, stages, strict=True))


def _question(parts: RunParts, parameters: Vector, number: int) -> SumQuestion:
    """Ask for updates as the rounds do; see rounds/secure_training.py."""
    plan = parts.host.plan
    spec = training_spec(
        plan,
        length=parameters.size,
        question_digest=training_question(encode_plan(plan.training)),
        base_digest=base_digest_of(parameters),
    )

    def push(configs: Mapping[int, bytes], ttl_s: float) -> dict[int, str]:
        return parts.exchange.ask_to_train(
            parameters,
            plan.training,
            list(configs),
            round_number=number,
            seed=0,
            min_examples=1,
            ttl_s=ttl_s,
            configs=configs,
        )

    return SumQuestion(
        purpose="train",
        round_number=number,
        stage="train",
        configure=configurer(
            parts,
            spec,
            round_number=number,
            groups=1,
            most=plan.layout().wanted,
            timeout_s=_ROUND_DEADLINE_S,
        ),
        push=push,
        wanted=plan.layout().wanted,
        timeout_s=_ROUND_DEADLINE_S,
        bytes_down=parameters.nbytes,
    )


def _check(fleet: SecureFleet, outcome: SumOutcome, lost: Mapping[str, Stage]) -> None:
    """Compare the sum with that of the encodings of all whose vector was sent."""
    (group,) = outcome.groups
    gone = {device for device, stage in lost.items() if stage in ("advertise", "share", "mask")}
    survivors = {part.device_id for part in outcome.participations if part.outcome == "replied"}
    if group.cause or group.survivors != len(survivors):
        raise AssertionError(f"there is no sum: {group.cause or 'others survived'}")
    if survivors != set(fleet.device_ids) - gone:
        raise AssertionError("somebody was lost who was not to be, or the other way round")
    check_sum(group, [fleet.device_ids.index(device) for device in sorted(survivors)])


def check_sum(group: GroupSum, places: Sequence[int]) -> None:
    """Raise AssertionError unless the sum is that of the vectors drawn at ``places``."""
    expected = empty_lanes(group.config)
    for place in places:
        lanes = drawn_lanes(group.config, place=place)
        np.add(expected.main, lanes.main, out=expected.main)
        np.add(expected.exact, lanes.exact, out=expected.exact)
    if group.lanes is None or group.lanes.digest() != expected.digest():
        raise AssertionError("the sum is not that of the survivors' encodings")


# --- the rows -------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _measured(setting: Setting, repeats: int) -> tuple[Measured, ...]:
    return tuple(secure_rounds(setting, repeats=repeats))


def _round_row(name: str, *, repeats: int, setting: Setting, most: float) -> Row:
    measured = _measured(setting, _rounds(setting, repeats))
    return row_at_most(name, statistics.median(m.seconds for m in measured), "s", limit=most)


def _devices_row(name: str, *, repeats: int, setting: Setting) -> Row:
    """Tell how much of the processors' time is the devices' keys, shares, masks and signatures."""
    measured = _measured(setting, _rounds(setting, repeats))
    value = round(statistics.median(m.protocol_s for m in measured), 4)
    return Row(name=name, value=value, unit="s", reference=None, ratio=None, target="", ok=None)


def _rounds(setting: Setting, repeats: int) -> int:
    """Return how many rounds are measured: of the large ones, fewer."""
    return min(repeats, 3) if setting.devices > 100 else repeats


def rows() -> Iterator[tuple[str, Callable[..., Row]]]:
    """Yield each row's name and its measurement."""
    for devices, most in ((100, 5), (256, 30)):
        setting = Setting(devices, lost=10)
        lost = ", 10 lost on the way" if devices == 100 else ""
        yield (
            f"secure round, {devices} light agents, d=10^5{lost}",
            partial(_round_row, setting=setting, most=most),
        )
        yield (
            f"devices' own CPU of it, {devices} light agents",
            partial(_devices_row, setting=setting),
        )
