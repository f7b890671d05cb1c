"""A run as its author writes it: the TOML file behind ``shoal run start``, checked and hashed.

Everything that shapes a result is here, frozen, stored with the run and covered by one digest, so
that every round can be run again.
"""

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.compression_plan import CompressionPlan
from shared.config import convert, read_document, read_toml
from shared.errors import ConfigError
from shared.judge_plan import JudgePlan
from shared.judging import Candidate, JudgeQuestion
from shared.plan_checks import check_plan
from shared.privacy_plan import (
    AggregationPlan,
    Layout,
    PrivacyPlan,
    lay_out,
    round_quorum,
    with_roster,
)
from shared.rollout_plan import RolloutPlan
from shared.statistics.questions import RowsPerDevice, StatisticsQuestion
from shared.statistics_plan import privacy_of_statistics
from shared.student_plan import StudentPlan
from shared.tasks.spec import TaskSpec

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=7 * 24 * 3600)]

_LONGEST_PREFIX = 50  # of a plan's name, that the names of runs it leads to begin with
_ANY_JUDGEMENT = JudgeQuestion(  # to see whether a plan's devices can be asked at all
    candidates=(Candidate(name="any", sha256="0" * 64),), reference="any", max_rows=1
)


class TrainingPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one device does in one round: minibatch SGD on its own data."""

    epochs: Count = 1
    max_batches: Count | None = None  # stops an epoch early on devices with much data
    batch_size: Count = 32
    learning_rate: Annotated[float, Meta(gt=0, le=100)] = 0.05
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0


class CohortPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who takes part, and how long anybody waits for whom."""

    size: Count = 20  # devices whose updates a round wants
    # Fewest updates that a round may commit with; 0 in a file: what [privacy] needs, or 1.
    quorum: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    over_selection: Annotated[float, Meta(ge=1, le=10)] = 1.0  # times size are asked
    min_examples: Count = 1  # rounded up to a power of two; who has fewer to train on says no
    recruit_deadline_s: Seconds = 300.0  # for quorum devices to join, at the start and after losses
    round_deadline_s: Seconds = 600.0  # for the updates of one round
    max_abandoned_rounds: Count = 3  # so many in a row end the run

    @property
    def asked(self) -> int:
        """Devices that a round asks: over-selection makes up for those that drop out."""
        return math.ceil(round(self.size * self.over_selection, 9))


class RunPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run, from its task to what happens with the model at the end."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    task: TaskSpec
    rounds: Count = 10
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0  # exact in JSON everywhere
    strategy: Literal["fedavg"] = "fedavg"
    training: TrainingPlan = TrainingPlan()
    cohort: CohortPlan = CohortPlan()
    privacy: PrivacyPlan = PrivacyPlan()
    aggregation: AggregationPlan = AggregationPlan()
    evaluate: bool = True  # measure each round's result on held-out rows of its cohort
    export: bool = True  # make a model version of the result
    deploy: bool = True  # ship the result to every device that has data for the task
    compression: CompressionPlan | None = None  # how the result is made smaller; None: as it comes
    rollout: RolloutPlan | None = None  # in which waves; None: to all at once
    judge: JudgePlan | None = None  # by which limits devices judge the result; None: nobody does
    statistics: StatisticsQuestion | None = None  # such a run asks this, once, and trains nothing
    judgement: JudgeQuestion | None = None  # likewise; it is asked for a run with `judge`
    student: StudentPlan | None = None  # such a run trains it for the compression of another one

    def __post_init__(self) -> None:
        """Refuse what could never commit, and fill in the quorum that the rest of it needs."""
        if self.asks:
            self._leave_out_training()
        cohort = self.cohort
        if cohort.quorum > cohort.size:
            raise ConfigError(
                f"cohort.quorum {cohort.quorum} is above cohort.size {cohort.size}; "
                "a round could never commit: lower the quorum"
            )
        check_plan(
            self.privacy,
            self.aggregation,
            size=cohort.size,
            asked=cohort.asked,
            quorum=cohort.quorum,
        )
        fewest = 1
        if self.privacy.mode == "secure":
            fewest = round_quorum(self.layout(), self.aggregation)
        if cohort.quorum < fewest:
            resolved = msgspec.structs.replace(cohort, quorum=fewest)
            msgspec.structs.force_setattr(self, "cohort", resolved)
        if self.compression is not None and self.compression.int8:
            self._check_calibration()
        if self.judge is not None:
            self._check_judge(self.judge)

    @property
    def asks(self) -> bool:
        """Whether the run only asks a question, and trains nothing."""
        return self.statistics is not None or self.judgement is not None

    def _check_calibration(self) -> None:
        """Refuse now what would fail only after training."""
        try:
            self.calibration(StatisticsQuestion(of=(RowsPerDevice(),)))
        except ConfigError as error:
            raise ConfigError(
                f"[compression] int8 = true asks devices for ranges after training: {error}; "
                "or write int8 = false"
            ) from error

    def _check_judge(self, judge: JudgePlan) -> None:
        """Refuse now what would fail only after training."""
        if judge.min_devices > self.cohort.asked:
            raise ConfigError(
                f"judge.min_devices {judge.min_devices} is above the {self.cohort.asked} devices "
                "that [cohort] asks, so nothing could ever be chosen: lower it"
            )
        try:
            self.judging(_ANY_JUDGEMENT)
        except ConfigError as error:
            raise ConfigError(
                f"[judge] asks devices to judge the result after training: {error}; or leave "
                "[judge] out"
            ) from error

    def calibration(self, question: StatisticsQuestion) -> "RunPlan":
        """Return the plan of the run that asks this one's devices for ranges.

        Raises:
            ConfigError: they cannot be asked so.
        """
        assert self.compression is not None
        return self._asking("calibrate", self.compression.calibration_noise, statistics=question)

    def studying(self, student: StudentPlan, *, suffix: str, rounds: int) -> "RunPlan":
        """Return the plan of the run in which this one's devices train a student."""
        return msgspec.structs.replace(
            self,
            name=f"{self.name[:_LONGEST_PREFIX]}-{suffix}",
            rounds=rounds,
            student=student,
            export=False,
            deploy=False,
            compression=None,
            judge=None,
            rollout=None,
        )

    def judging(self, question: JudgeQuestion) -> "RunPlan":
        """Return the plan of the run that has this one's devices judge its files.

        Raises:
            ConfigError: they cannot be asked so.
        """
        assert self.judge is not None
        return self._asking("judge", self.judge.noise, judgement=question)

    def _asking(
        self,
        suffix: str,
        noise: Literal["distributed", "none"],
        *,
        statistics: StatisticsQuestion | None = None,
        judgement: JudgeQuestion | None = None,
    ) -> "RunPlan":
        privacy = msgspec.structs.replace(
            self.privacy, noise=noise, weights="uniform", adaptive_clipping=False
        )
        return RunPlan(
            name=f"{self.name[:_LONGEST_PREFIX]}-{suffix}",
            task=self.task,
            seed=self.seed,
            cohort=self.cohort,
            privacy=privacy,
            statistics=statistics,
            judgement=judgement,
        )

    def _leave_out_training(self) -> None:
        """Write down what the rest of the plan comes to in a run that only asks."""
        for table in ("compression", "judge"):
            if getattr(self, table) is not None:
                raise ConfigError(
                    f"[{table}] is of a model, and a run with [statistics] makes none: leave it out"
                )
        privacy = privacy_of_statistics(self.privacy, self.aggregation, asked=self.cohort.asked)
        for name, value in {
            "privacy": privacy,
            "rounds": 1,
            "evaluate": False,
            "deploy": False,
        }.items():
            msgspec.structs.force_setattr(self, name, value)

    def layout(self, *, grouped: bool = True, roster_max: int | None = None) -> Layout:
        """Return how the devices of a round are parted into sums.

        Args:
            grouped: False for measuring and for statistics, which never use groups.
            roster_max: devices that are asked for one of the sums; None: all that may be.
        """
        cohort = self.cohort
        quorum = cohort.quorum if grouped or self.asks else 0
        layout = lay_out(
            self.privacy,
            self.aggregation,
            size=cohort.size,
            asked=cohort.asked,
            quorum=quorum,
            grouped=grouped,
        )
        return layout if roster_max is None else with_roster(layout, roster_max, quorum=quorum)

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the deterministic JSON of the resolved plan."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


def read_plan(path: Path) -> RunPlan:
    """Read a plan's TOML file.

    ``task`` may be a table, or the path of the task file (relative to the plan) that the owners of
    the devices use as well, so that nobody writes a task twice.

    Raises:
        ConfigError: a file is unreadable or does not fit; names the key.
    """
    document = read_document(path)
    if isinstance(task := document.get("task"), str):
        document["task"] = msgspec.to_builtins(read_toml(path.parent / task, TaskSpec))
    return plan_from(document, source=str(path))


def plan_from(document: Any, *, source: str) -> RunPlan:
    """Check a plan as it was written; statistics that say nothing of noise are noised (R8).

    Args:
        document: what TOML or JSON became.
        source: of the document, for people.

    Raises:
        ConfigError: it does not fit; names the key.
    """
    for key, table in (("judgement", "judge"), ("student", "compression.distil")):
        if isinstance(document, dict) and document.get(key) is not None:
            raise ConfigError(
                f"{source}: {key} is of runs that another one starts; leave it out and write a "
                f"table [{table}] in the plan of a run that trains"
            )
    if isinstance(document, dict) and isinstance(asked := document.get("statistics"), dict):
        if asked.get("probe") is not None:
            raise ConfigError(
                f"{source}: statistics.probe is asked by a compression alone; leave it out and "
                "write [compression] int8 = true in a plan that trains"
            )
        privacy = document.get("privacy", {})
        if isinstance(privacy, dict):
            document = {**document, "privacy": {"noise": "distributed", **privacy}}
    return convert(document, RunPlan, source=source)
