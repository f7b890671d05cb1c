"""How what was built is described: in the manifest that is signed, and in the registry's rows."""

from collections.abc import Collection
from datetime import datetime
from importlib.metadata import version as installed_version

import msgspec

from cloud_coordinator.models.judgement import Judgement
from cloud_coordinator.models.pipeline_messages import Built, VariantReport
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from shared.manifest import Artifact, Lineage, Manifest
from shared.run_plan import RunPlan


def manifest_of(row: ModelVersionRow, plan: RunPlan, built: Built, *, now: datetime) -> Manifest:
    """Describe what was built; variants that did not pass are not signed."""
    artifacts = [
        Artifact(
            variant=report.variant,
            sha256=report.sha256,
            size_bytes=report.size_bytes,
            session_config=report.session_config,
            tolerance=report.tolerance,
            needs=report.needs,
        )
        for report in built.variants
        if report.passed
    ]
    lineage = Lineage(
        run_id=row.run_id,
        rounds=row.rounds,
        plan_digest=plan.digest,
        parameters_sha256=row.parameters_sha256,
        code_version=installed_version("shoal"),
        parent=row.parent,
        network=built.student,
    )
    return Manifest(
        model=row.model,
        task=plan.task,
        created_at=now,
        inputs=built.inputs,
        outputs=built.outputs,
        labels=built.labels,
        artifacts=tuple(artifacts),
        ship=built.ship,
        golden=built.golden,
        lineage=lineage,
    )


def judged_build(built: Built, judgement: Judgement) -> Built:
    """Return a build whose variants have passed only if devices let them pass too."""
    judged = {variant.variant for variant in judgement.variants}
    objections = judgement.objections

    def after(report: VariantReport) -> VariantReport:
        cause = objections.get(report.variant, "")
        if report.variant not in judged:
            cause = "no device judged it: it is not among the smallest"
        if not report.passed or not cause:
            return report
        return msgspec.structs.replace(report, passed=False, cause=cause)

    return msgspec.structs.replace(
        built, variants=tuple(map(after, built.variants)), ship=judgement.ship
    )


def judgement_in(row: ModelVersionRow) -> Judgement | None:
    """Return what devices found of a version; None where nobody judged it."""
    if row.judgement is None:
        return None
    return msgspec.json.decode(row.judgement, type=Judgement)


def why_none(judgement: Judgement) -> str:
    """Say which gates held back every variant of a version."""
    each = "; ".join(f"{name}: {cause}" for name, cause in judgement.objections.items())
    return f"no variant passed on the devices, compared with {judgement.reference}: {each}"


def variant_rows(
    run_id: str, reports: Collection[VariantReport], *, ship: str | None
) -> list[VariantRow]:
    """Return a row for each variant that was built, with ``ship`` marked; unsaved."""
    rows = []
    for position, report in enumerate(reports):
        figures = msgspec.structs.asdict(report)
        for name in (
            "file",
            "tolerance",
            "needs",
        ):  # the first is gone, the manifest has the others
            del figures[name]
        if not report.passed:
            figures["sha256"] = None  # nobody may download it
        rows.append(
            VariantRow(run_id=run_id, position=position, shipped=report.variant == ship, **figures)
        )
    return rows
