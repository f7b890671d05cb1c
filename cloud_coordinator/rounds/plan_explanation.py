"""What a plan's secure sums promise and what they do not, in sentences for whoever starts a run."""

import math

from cloud_coordinator.rounds.clipping import PROMISED, central_charge
from shared.judging import Candidate, JudgeQuestion, Scorecard
from shared.privacy_plan import ROBUST, Layout, trimmed_groups
from shared.run_plan import RunPlan
from shared.secure_sum.accounting import gaussian_rdp
from shared.secure_sum.config import dropped_of, threshold_of
from shared.statistics.probes import DEFAULT_REACH, MOST_NOISE
from shared.statistics.questions import Mean, StatisticsQuestion
from shared.statistics.vectors import largest_norm

_USUAL_RANGES = 8  # that a small network needs; one layer more is one range more
_DEFAULT_MIN_COHORT = 18  # what owners' policies have where they say nothing


def explain(plan: RunPlan, *, length: int | None = None) -> list[str]:
    """Return the lines that ``shoal run start`` prints.

    Args:
        plan: complete.
        length: d, parameters of the model, where it is known.
    """
    if plan.privacy.mode == "plain":
        return [
            "plain rounds: the coordinator sees every device's update",
            "owners: their policies must say individual_updates = true",
        ]
    layout = plan.layout()
    if plan.asks:
        return [
            _devices(plan, layout),
            _tolerance(layout),
            _anonymity(layout),
            *(_noise_of_answers(plan, plan.statistics, layout) if plan.statistics else ()),
            _owners(plan, layout),
        ]
    return [
        _devices(plan, layout),
        _tolerance(layout),
        _anonymity(layout),
        _upload(plan, length),
        *_noise(plan, layout),
        _poisoning(plan, layout),
        *_students(plan),
        *_ranges(plan),
        *_judging(plan),
        _owners(plan, layout),
    ]


def _devices(plan: RunPlan, layout: Layout) -> str:
    asked = plan.cohort.asked
    sums = f"{layout.groups} secure sums of up to" if layout.groups > 1 else "one secure sum of"
    return (
        f"devices: {sums} {layout.max_roster}, {asked} asked in all; each sum needs "
        f"{layout.min_survivors} survivors: {layout.at_least} honest ones (at_least) and "
        f"{layout.corrupted} that may be in league with the coordinator"
    )


def _tolerance(layout: Layout) -> str:
    size = layout.max_roster
    return (
        f"losses: any number before keys are agreed on while {layout.min_survivors} are left; then "
        f"{layout.tolerated_drops} of {size} ({dropped_of(layout, size)} by drop_fraction "
        f"{layout.drop_fraction:g}); {threshold_of(layout, size)} of {size - 1} shares rebuild a "
        "secret"
    )


def _anonymity(layout: Layout) -> str:
    if layout.groups == 1:
        return (
            f"anonymity set: the survivors of the cohort, {layout.honest_survivors} honest ones at "
            "least"
        )
    which = "a group" if layout.threshold == "group" else "a shard"
    return (
        f"anonymity set: {which} of {layout.max_roster}, {layout.honest_survivors} honest ones at "
        "least, and not the cohort: the coordinator sees each sum"
        + (
            "; against one that lies, or a group with more corrupted devices, so few protect less"
            if layout.threshold == "group"
            else ""
        )
    )


def _upload(plan: RunPlan, length: int | None) -> str:
    width = plan.privacy.lane_bits // 8
    of_model = f", {width * length:,} bytes for {length:,}" if length is not None else ""
    return f"upload: {width} bytes for each parameter{of_model}, and some kilobytes of keys"


def _noise(plan: RunPlan, layout: Layout) -> list[str]:
    privacy, rounds = plan.privacy, plan.rounds
    if privacy.noise == "none":
        return ["noise: none; sums are exact, and no ε is promised for the data sets in them"]
    multiplier = privacy.noise_multiplier
    if privacy.noise == "central":
        epsilon = central_charge(multiplier, rounds).epsilon(privacy.delta)
        added = (
            f"noise: central, σ = {multiplier:g}·clip_norm of the sum, {PROMISED} and enforced by "
            "nobody: it has seen the exact sum"
        )
        spent = (
            f"privacy: ε = {epsilon:.3g} at δ = {privacy.delta:g} after {rounds} rounds, for who "
            "gets the model; the devices' ledgers count the sums as exact"
        )
        return [added, spent]
    added = (
        f"noise: {privacy.noise_kind}, added by the devices; "
        f"σ = {multiplier * privacy.clip_norm:.3g} in each coordinate of each sum by "
        f"{layout.honest_survivors} honest devices alone, {_mean_sigma(plan, layout):.3g} in the "
        "mean of all"
    )
    if layout.groups > 1:
        added += (
            f"; since each sum is seen, that is √{layout.groups} = {math.sqrt(layout.groups):.3g} "
            "times what a single sum of so many devices needs"
        )
    epsilon = gaussian_rdp(multiplier).times(rounds).epsilon(privacy.delta)
    measured = "; as much again of their held-out rows" if plan.evaluate else ""
    spent = (
        f"privacy: about ε = {epsilon:.3g} at δ = {privacy.delta:g} of its training rows for a "
        f"device that is in all {rounds} rounds, enforced by the devices{measured}"
    )
    return [added, spent]


def _noise_of_answers(plan: RunPlan, question: StatisticsQuestion, layout: Layout) -> list[str]:
    privacy = plan.privacy
    if privacy.noise == "none":
        return [
            "noise: none; the answers are exact, and no ε is promised for the data sets in them"
        ]
    # Every device adds its share, of which the honest ones' alone suffice.
    shares = plan.cohort.size / layout.honest_survivors
    sigma = privacy.noise_multiplier * largest_norm(question) * math.sqrt(shares)
    epsilon = gaussian_rdp(privacy.noise_multiplier).epsilon(privacy.delta)
    added = (
        f"noise: {privacy.noise_kind}, added by the devices; it moves each count by about "
        f"±{sigma * question.max_rows:,.0f} rows, and a mean by ±{sigma / plan.cohort.size:.2g} of "
        f"half its range if each of {plan.cohort.size} devices has {question.max_rows:,} rows "
        "(statistics.max_rows) or more; less with fewer statistics in one question"
    )
    spent = (
        f"privacy: about ε = {epsilon:.3g} at δ = {privacy.delta:g} of its training rows for each "
        "device that answers, enforced by the devices"
    )
    return [added, spent]


def _students(plan: RunPlan) -> list[str]:
    """Say what distillation costs the devices besides."""
    if plan.compression is None or (distil := plan.compression.distil) is None:
        return []
    what = (
        f"distillation: two more runs of {distil.rounds} rounds train {distil.student}, one with "
        "the trained network as its teacher and one without"
    )
    privacy = plan.privacy
    if privacy.noise != "distributed":
        return [what]
    epsilon = gaussian_rdp(privacy.noise_multiplier).times(2 * distil.rounds).epsilon(privacy.delta)
    return [f"{what}, for about ε = {epsilon:.3g} at δ = {privacy.delta:g}"]


def _ranges(plan: RunPlan) -> list[str]:
    """Say what static int8 costs the devices, and whether noise leaves it anything."""
    if plan.compression is None or not plan.compression.int8:
        return []
    question = StatisticsQuestion(of=(Mean(feature="a range"),) * _USUAL_RANGES)
    asked = plan.calibration(question)
    what = "ranges for static int8: after training the same devices are asked once more, "
    if asked.privacy.noise == "none":
        return [what + "exactly, so owners' policies must say exact_sums = true"]
    shares = asked.cohort.size / asked.layout().honest_survivors
    sigma = asked.privacy.noise_multiplier * largest_norm(question) * math.sqrt(shares)
    moved = DEFAULT_REACH * sigma / asked.cohort.size
    epsilon = gaussian_rdp(asked.privacy.noise_multiplier).epsilon(asked.privacy.delta)
    return [
        f"{what}for about ε = {epsilon:.3g} at δ = {asked.privacy.delta:g}; noise moves each of "
        f"{_USUAL_RANGES} ranges by about ±{moved:.2g} octaves"
        + ("" if moved <= MOST_NOISE else f", more than the {MOST_NOISE:g} that leave it any use")
    ]


def _judging(plan: RunPlan) -> list[str]:
    """Say what judging costs the devices, and whether noise lets it decide anything."""
    if plan.judge is None:
        return []
    judge, candidates = plan.judge, plan.judge.candidates + 1  # the current version's file too
    names = [Candidate(name=f"file-{number}", sha256="0" * 64) for number in range(candidates)]
    question = JudgeQuestion(
        candidates=tuple(names), reference="file-0", max_rows=judge.max_rows, bins=judge.bins
    )
    asked = plan.judging(question)
    what = f"judging: up to {candidates} files on held-out rows, in a run of their own, "
    if judge.is_exact:
        return [what + "exactly, so owners' policies must say exact_sums = true"]
    shares = asked.cohort.size / asked.layout().honest_survivors
    sigma = asked.privacy.noise_multiplier * Scorecard(question).norm * math.sqrt(shares)
    moved = judge.reach * sigma / asked.cohort.size
    epsilon = gaussian_rdp(asked.privacy.noise_multiplier).epsilon(asked.privacy.delta)
    return [
        f"{what}for about ε = {epsilon:.3g} at δ = {asked.privacy.delta:g} of them; noise moves "
        f"what a file gains or loses by about ±{moved:.2g} of a score"
        + (
            ""
            if moved < judge.max_loss
            else f", so no loss near judge.max_loss {judge.max_loss:g} can be decided: ask more "
            "devices, judge fewer candidates, or write noise = 'none'"
        )
    ]


def _mean_sigma(plan: RunPlan, layout: Layout) -> float:
    """Return σ of the mean's noise when all wanted devices are in it; each adds its share."""
    devices, privacy = layout.wanted * layout.groups, plan.privacy
    share = (privacy.noise_multiplier * privacy.clip_norm) ** 2 / layout.honest_survivors
    return math.sqrt(devices * share) / devices


def _poisoning(plan: RunPlan, layout: Layout) -> str:
    aggregation, groups = plan.aggregation, layout.groups
    if aggregation.combine not in ROBUST:
        return (
            "poisoned devices: none are tolerated; one can move the mean of its sum by up to "
            f"clip_norm {plan.privacy.clip_norm:g}, and spoil the sum where it breaks its bounds"
        )
    if aggregation.combine == "norm-bound":
        assert aggregation.norm_bound is not None
        moved = 2 * aggregation.norm_bound / groups
        return (
            f"poisoned devices: none are outvoted; each group that holds one moves the mean by "
            f"{moved:.3g} at most"
        )
    tolerated = (groups - 1) // 2
    if aggregation.combine == "trimmed-mean":
        tolerated = min(tolerated, trimmed_groups(aggregation, groups))
    hit = 1 - (1 - aggregation.poisoned_fraction) ** layout.max_roster
    expected = (
        f"; poisoned_fraction {aggregation.poisoned_fraction:g} reaches {hit:.0%} of the groups on "
        "average"
        if aggregation.poisoned_fraction
        else ""
    )
    return (
        f"poisoned devices: any {tolerated}, and any number within {tolerated} of the {groups} "
        f"groups, by {aggregation.combine}{expected}"
    )


def _owners(plan: RunPlan, layout: Layout) -> str:
    needs = []
    fewest = min(layout.min_survivors, plan.layout(grouped=False).min_survivors)
    if fewest < _DEFAULT_MIN_COHORT:
        needs.append(f"min_cohort = {fewest} or less")
    if plan.privacy.noise != "distributed":
        needs.append("exact_sums = true")
    if not needs:
        return "owners: what their policies allow where they say nothing suffices"
    return f"owners: their policies must say {' and '.join(needs)}"
