"""What devices are asked to judge of a version, and what their answers come to; pure."""

from collections.abc import Sequence

import msgspec

from cloud_coordinator.compression.gates import Findings, choose, judge_variants
from cloud_coordinator.models.judgement import Judgement
from cloud_coordinator.models.pipeline_messages import FP32, Built, VariantReport
from cloud_coordinator.models.tables import ModelVersionRow
from cloud_coordinator.runs.records import REPLIED, RunDetails
from shared.judge_plan import JudgePlan
from shared.judging import Candidate, CandidateFacts, JudgeQuestion
from shared.statistics.vectors import Answer

CURRENT = "current"  # the name of the file that devices serve now


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A question, and what is compared with what, for people."""

    question: JudgeQuestion
    reference: str


def ask_about(built: Built, current: ModelVersionRow | None, plan: JudgePlan) -> Asked:
    """Return what devices are asked about the variants that compute what torch does.

    They are compared with what is served now, or where nothing is that takes the same inputs, with
    the version's own fp32 file.
    """
    chosen = _candidates(built, plan)
    served = _served(current, built)
    candidates = [
        Candidate(name=r.variant, sha256=r.sha256, session_config=r.session_config) for r in chosen
    ]
    if served is not None:
        candidates.insert(0, served)
    question = JudgeQuestion(
        candidates=tuple(candidates),
        reference=candidates[0].name,
        max_rows=plan.max_rows,
        reach=plan.reach,
        bins=plan.bins,
        labels=len(built.labels) if plan.is_exact else 0,
    )
    if served is None or current is None:
        return Asked(question=question, reference="its own fp32 file")
    return Asked(question=question, reference=f"version {(current.version or '')[:12]}")


def judgement_of(asked: Asked, built: Built, plan: JudgePlan, details: RunDetails) -> Judgement:
    """Return what the devices' answers come to.

    Args:
        asked: the question.
        built: the version.
        plan: with the limits.
        details: of the run that asked, which is finished.
    """
    answered = next(row for row in reversed(details.rounds) if row.answers)
    answers = tuple(msgspec.convert(answer, Answer) for answer in answered.answers or ())
    facts = {
        part.device_id: {
            each.name: each
            for each in msgspec.convert(part.facts or [], tuple[CandidateFacts, ...])
        }
        for part in details.participations
        if part.round_number == answered.round_number and part.outcome == REPLIED
    }
    names = {candidate.name for candidate in asked.question.candidates}
    judged = {r.variant: r for r in built.variants if r.variant in names}
    findings = Findings(
        answers={answer.feature: answer for answer in answers},
        facts=facts,
        reference=asked.question.reference,
        sizes={name: report.size_bytes for name, report in judged.items()},
    )
    variants = judge_variants(plan, findings)
    needs = {name: report.needs for name, report in judged.items()}
    return Judgement(
        run_id=details.run.run_id,
        reference=asked.reference,
        noise=plan.noise,
        devices=len(facts),
        answers=answers,
        variants=variants,
        ship=choose([v.variant for v in variants if v.passed], findings, needs),
    )


def _candidates(built: Built, plan: JudgePlan) -> Sequence[VariantReport]:
    """Return fp32 and the smallest others, as many as the plan allows."""
    passed = sorted((r for r in built.variants if r.passed), key=lambda r: r.size_bytes)
    first = [r for r in passed if r.variant == FP32]
    return [*first, *(r for r in passed if r.variant != FP32)][: plan.candidates]


def _served(current: ModelVersionRow | None, built: Built) -> Candidate | None:
    """Return the current version's file; None where there is none that can stand beside."""
    if current is None or current.built is None:
        return None
    before = msgspec.json.decode(current.built, type=Built)
    same = (before.inputs, before.outputs, before.labels)
    if same != (built.inputs, built.outputs, built.labels):
        return None
    shipped = next((r for r in before.variants if r.variant == before.ship), None)
    if shipped is None or not shipped.sha256:
        return None
    return Candidate(name=CURRENT, sha256=shipped.sha256, session_config=shipped.session_config)
