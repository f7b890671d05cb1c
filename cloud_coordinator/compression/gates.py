"""The gates between what devices found and what is signed; pure.

Each compares a variant with a limit. Where the noise of a sum could have moved the figure across
the limit, the gate is undecided and says how far that noise reaches: it never passes by luck.
"""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cloud_coordinator.models.judgement import Judged, Outcome, Verdict
from shared.judge_plan import JudgePlan
from shared.judging import GAIN, MEAN, WORST_DECILE, CandidateFacts, recalls_of
from shared.statistics.vectors import Answer

_HAIR = 1e-6  # exact sums are of numbers that were rounded to their steps
_MAX_SLOWDOWN = 1.5  # of the shipped variant against the fastest
_HOW_TO_DECIDE = "ask more devices, judge fewer candidates, or allow exact sums"

Facts = Mapping[str, Mapping[str, CandidateFacts]]  # by device, then by candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that came back from the devices."""

    answers: Mapping[str, Answer]  # by candidate
    facts: Facts  # of devices whose scorecards are in the sum
    reference: str  # the candidate that the others are compared with
    sizes: Mapping[str, int]  # bytes of each variant's file


def judge_variants(plan: JudgePlan, findings: Findings) -> tuple[Judged, ...]:
    """Return what every gate says of each variant, in the order of ``findings.sizes``."""
    return tuple(
        Judged(variant=name, verdicts=tuple(_verdicts(plan, findings, name)))
        for name in findings.sizes
    )


def choose(
    passed: Collection[str], findings: Findings, needs: Mapping[str, Collection[str]]
) -> str:
    """Return which variant to favour: the smallest that is not much slower than the fastest.

    One that asks something special of a processor is favoured only where there is no other.

    Args:
        passed: variants that no gate held back; empty: the result is empty too.
        findings: with the devices' own times.
        needs: by variant, as in the manifest.
    """
    common = [name for name in passed if not needs.get(name)] or list(passed)
    if not common:
        return ""
    p50 = {name: statistics.median(f.p50_ms for f in _of(findings, name)) for name in common}
    quick = [name for name in common if p50[name] <= _MAX_SLOWDOWN * min(p50.values())]
    return min(quick, key=lambda name: (findings.sizes[name], p50[name]))


def _verdicts(plan: JudgePlan, findings: Findings, name: str) -> Iterator[Verdict]:
    yield _devices(plan, findings)
    yield _runs(plan, findings, name)
    yield from _scores(plan, findings, name)
    yield _latency(plan, findings, name)
    if plan.max_bytes is not None:
        yield _verdict("size", findings.sizes[name], plan.max_bytes, "its file is {:,.0f} bytes")
    if plan.max_memory_bytes is not None:
        most = max((f.memory_bytes for f in _of(findings, name)), default=0)
        yield _verdict("memory", most, plan.max_memory_bytes, "it takes {:,.0f} bytes on a device")


def _devices(plan: JudgePlan, findings: Findings) -> Verdict:
    found, wanted = len(findings.facts), plan.min_devices
    enough = found >= wanted
    words = f"{found} devices judged it" + ("" if enough else f", fewer than {wanted}")
    return Verdict(gate="devices", outcome="pass" if enough else "fail", words=words)


def _runs(plan: JudgePlan, findings: Findings, name: str) -> Verdict:
    failures = {
        device: facts[name].failure
        for device, facts in findings.facts.items()
        if name in facts and facts[name].failure
    }
    share = len(failures) / max(1, len(findings.facts))
    words = "it fails on {:.0%} of the devices"
    if failures:
        device, cause = next(iter(failures.items()))
        words += f" ({device}: {cause})".replace("{", "{{").replace("}", "}}")
    return _verdict("runs", share, plan.max_failed, words)


def _scores(plan: JudgePlan, findings: Findings, name: str) -> Iterator[Verdict]:
    """Compare what was summed; the reference has lost nothing against itself."""
    own, reference = findings.answers[name], findings.answers[findings.reference]
    loss = -own.values.get(GAIN, 0.0)
    error = 0.0 if name == findings.reference else own.standard_error.get(GAIN, 0.0)
    mean = reference.values[MEAN]
    yield _verdict(
        "score", loss, plan.max_loss, f"it loses {{:.4f}} of a mean score of {mean:.4f}", error
    )
    worst, before = own.values[WORST_DECILE], reference.values[WORST_DECILE]
    errors = [a.standard_error.get(WORST_DECILE, 0.0) for a in (own, reference)]
    error = 0.0 if name == findings.reference else (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    what = f"the worst tenth of the devices loses {{:.4f}} of a score of {before:.4f}"
    yield _verdict("worst decile", before - worst, plan.max_worst_decile_loss, what, error)
    losses = {
        label: recall - recalls_of(own).get(label, 0.0)
        for label, recall in recalls_of(reference).items()
    }
    if losses:
        label = max(losses, key=losses.__getitem__)
        what = f"of class {label} it names {{:.4f}} fewer right"
        yield _verdict("label", losses[label], plan.max_label_loss, what)


def _latency(plan: JudgePlan, findings: Findings, name: str) -> Verdict:
    ratios = [
        facts[name].p95_ms / facts[findings.reference].p95_ms
        for facts in findings.facts.values()
        if name in facts
        and not facts[name].failure
        and findings.reference in facts
        and facts[findings.reference].p95_ms > 0
    ]
    if not ratios:
        words = "no device could time it beside the reference"
        return Verdict(gate="latency", outcome="undecided", words=words)
    what = "its p95 is {:.2f} times the reference's on the median device"
    return _verdict("latency", statistics.median(ratios), plan.max_latency_ratio, what)


def _verdict(
    gate: str, value: float, limit: float, what: str, standard_error: float = 0.0
) -> Verdict:
    """Compare a figure that should be small with its limit."""
    words = what.format(value)
    if standard_error:
        words += f" (noise: ± {standard_error:.4f})"
    outcome: Outcome = "pass" if value <= limit + _HAIR else "fail"
    if abs(value - limit) < standard_error:
        outcome = "undecided"
        words += f", too near the limit of {limit:g} for this noise: {_HOW_TO_DECIDE}"
    elif outcome == "fail":
        words += f", and {limit:g} is the most allowed"
    return Verdict(gate=gate, outcome=outcome, words=words)


def _of(findings: Findings, name: str) -> Sequence[CandidateFacts]:
    """Return the facts of a variant from the devices on which it runs."""
    of_all = (facts[name] for facts in findings.facts.values() if name in facts)
    return [facts for facts in of_all if not facts.failure]
