"""The steps of a compression: their order, and what each leaves behind; pure.

A job belongs to one run, which is exporting as long as the job goes on. Its state is the list of
the steps that are done, each stored with its result before the next begins; so after a crash it
goes on with the first one that is not there.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from shared.run_plan import RunPlan
from shared.statistics.probes import Probe
from shared.statistics.vectors import Answer


class Step(StrEnum):
    """One thing to do."""

    DISTIL = "distil"  # have devices train a smaller network that learns from the trained one
    SCRATCH = "scratch"  # and once more without a teacher, to see what that is worth
    PROBE = "probe"  # find out which ranges inside the model have to be measured
    CALIBRATE = "calibrate"  # have devices measure them, in a run of its own
    BUILD = "build"  # make every variant, and compare each with torch
    JUDGE = "judge"  # have devices judge the exact files, and hold back what fails a gate
    SIGN = "sign"  # sign what passed


class StudentTrained(msgspec.Struct, frozen=True, kw_only=True, tag="student"):
    """Of `Step.DISTIL` and `Step.SCRATCH`: a smaller network."""

    run_id: str  # in which devices trained it
    network: str
    parameters_sha256: str
    rounds: int
    metrics: dict[str, float]  # on held-out rows, after the last round

    @property
    def words(self) -> str:
        """What came of it, for people."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.network} trained by run {self.run_id}: {figures or 'not measured'}"


class ProbeMade(msgspec.Struct, frozen=True, kw_only=True, tag="probe-made"):
    """Of `Step.PROBE`: devices can be asked."""

    probe: Probe

    @property
    def words(self) -> str:
        """What came of it, for people."""
        return f"{len(self.probe.columns)} ranges of {len(self.probe.tensors)} tensors to measure"


class Calibrated(msgspec.Struct, frozen=True, kw_only=True, tag="calibrated"):
    """Of `Step.CALIBRATE`: devices answered."""

    run_id: str  # of the run that asked them
    answers: tuple[Answer, ...]

    @property
    def words(self) -> str:
        """What came of it, for people."""
        return f"measured by run {self.run_id}"


class VariantsBuilt(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    """Of `Step.BUILD`: the version's row has the variants."""

    passed: int
    built: int
    trained_by: str = ""  # the run that trained the student; empty: nobody did

    @property
    def words(self) -> str:
        """What came of it, for people."""
        words = f"{self.passed} of {self.built} variants compute what torch does"
        return words + (f", of what run {self.trained_by} trained" if self.trained_by else "")


class Judged(msgspec.Struct, frozen=True, kw_only=True, tag="judged"):
    """Of `Step.JUDGE`: the version's row has the judgement."""

    run_id: str  # of the run that asked the devices
    devices: int
    passed: int
    judged: int

    @property
    def words(self) -> str:
        """What came of it, for people."""
        return (
            f"{self.passed} of {self.judged} variants passed on {self.devices} devices, by run "
            f"{self.run_id}"
        )


class Signed(msgspec.Struct, frozen=True, kw_only=True, tag="signed"):
    """Of `Step.SIGN`: the version's name."""

    version: str

    @property
    def words(self) -> str:
        """What came of it, for people."""
        return f"version {self.version[:12]}"


class LeftOut(msgspec.Struct, frozen=True, kw_only=True, tag="left-out"):
    """Of a step that the job can do without: it was tried, or made no sense any more."""

    cause: str

    @property
    def words(self) -> str:
        """What came of it, for people."""
        return f"left out: {self.cause}"


StepResult = StudentTrained | ProbeMade | Calibrated | VariantsBuilt | Judged | Signed | LeftOut


def next_step(plan: RunPlan, done: Mapping[Step, StepResult]) -> Step | None:
    """Return what is to be done now; None when the job is over.

    This is the only place that knows the order.
    """
    return next((step for step in _wanted(plan, done) if step not in done), None)


def _wanted(plan: RunPlan, done: Mapping[Step, StepResult]) -> list[Step]:
    steps = [Step.BUILD, *[Step.JUDGE] * (plan.judge is not None), Step.SIGN]
    if plan.compression is None:
        return steps
    if plan.compression.int8:
        nothing_to_ask = isinstance(done.get(Step.PROBE), LeftOut)
        steps = [Step.PROBE, *[Step.CALIBRATE] * (not nothing_to_ask), *steps]
    if plan.compression.distil is not None:
        steps = [Step.DISTIL, Step.SCRATCH, *steps]
    return steps
