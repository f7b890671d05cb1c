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

    PROBE = "probe"  # find out which ranges inside the model have to be measured
    CALIBRATE = "calibrate"  # have devices measure them, in a run of its own
    BUILD = "build"  # make every variant, and compare each with torch
    JUDGE = "judge"  # have devices judge the exact files, and hold back what fails a gate
    SIGN = "sign"  # sign what passed


class ProbeMade(msgspec.Struct, frozen=True, kw_only=True, tag="probe-made"):
    """Of `Step.PROBE`: devices can be asked."""

    probe: Probe


class Calibrated(msgspec.Struct, frozen=True, kw_only=True, tag="calibrated"):
    """Of `Step.CALIBRATE`: devices answered."""

    run_id: str  # of the run that asked them
    answers: tuple[Answer, ...]


class VariantsBuilt(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    """Of `Step.BUILD`: the version's row has the variants."""

    passed: int
    built: int


class Judged(msgspec.Struct, frozen=True, kw_only=True, tag="judged"):
    """Of `Step.JUDGE`: the version's row has the judgement."""

    run_id: str  # of the run that asked the devices
    devices: int
    passed: int
    judged: int


class Signed(msgspec.Struct, frozen=True, kw_only=True, tag="signed"):
    """Of `Step.SIGN`: the version's name."""

    version: str


class LeftOut(msgspec.Struct, frozen=True, kw_only=True, tag="left-out"):
    """Of a step that the job can do without: it was tried, or made no sense any more."""

    cause: str


StepResult = ProbeMade | Calibrated | VariantsBuilt | Judged | Signed | LeftOut


def next_step(plan: RunPlan, done: Mapping[Step, StepResult]) -> Step | None:
    """Return what is to be done now; None when the job is over.

    This is the only place that knows the order.
    """
    return next((step for step in _wanted(plan, done) if step not in done), None)


def in_words(result: StepResult) -> str:
    """Say for people what came of a step."""
    match result:
        case ProbeMade(probe=probe):
            return f"{len(probe.columns)} ranges of {len(probe.tensors)} tensors to measure"
        case Calibrated(run_id=run_id):
            return f"measured by run {run_id}"
        case VariantsBuilt(passed=passed, built=built):
            return f"{passed} of {built} variants compute what torch does"
        case Judged(run_id=run_id, devices=devices, passed=passed, judged=judged):
            return f"{passed} of {judged} variants passed on {devices} devices, by run {run_id}"
        case Signed(version=version):
            return f"version {version[:12]}"
        case LeftOut(cause=cause):
            return f"left out: {cause}"


def _wanted(plan: RunPlan, done: Mapping[Step, StepResult]) -> list[Step]:
    steps = [Step.BUILD, *[Step.JUDGE] * (plan.judge is not None), Step.SIGN]
    if plan.compression is None or not plan.compression.int8:
        return steps
    if isinstance(done.get(Step.PROBE), LeftOut):  # there is nothing to ask
        return [Step.PROBE, *steps]
    return [Step.PROBE, Step.CALIBRATE, *steps]
