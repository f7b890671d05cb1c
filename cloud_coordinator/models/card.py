"""The model card: what a version is, in Markdown, written from facts alone.

Sections follow Mitchell et al., "Model Cards for Model Reporting" (2019), as far as a coordinator
that never saw a row can fill them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cloud_coordinator.models.catalogue import PrivacySpent, VersionFacts
from cloud_coordinator.models.judgement import Judgement
from cloud_coordinator.rounds.clipping import PROMISED


def model_card(facts: VersionFacts) -> str:
    """Return the card of a version."""
    sections = (
        f"# {facts.model}, version {facts.version[:12]}\n\n" + _details(facts),
        "## Task\n\n" + _table(_task(facts.plan["task"])),
        "## Training\n\n" + _training(facts),
        "## Measured\n\n" + _measured(facts),
        "## Judged on devices\n\n" + _judged(facts.judgement),
        "## Privacy\n\n" + privacy_sentence(facts.privacy),
        "## Files\n\n" + _files(facts),
        "## Notes\n\n" + _notes(facts),
    )
    return "\n\n".join(sections) + "\n"


def privacy_sentence(privacy: PrivacySpent) -> str:
    """Say in one sentence what training cost a device that was in every round."""
    if privacy.mode == "plain":
        return "The coordinator saw the update of each device; nothing is promised."
    if privacy.epsilon is None:
        return (
            "The coordinator saw sums of the devices' updates alone. They are exact: no ε is "
            "promised for the data sets in them."
        )
    by = f" ({PROMISED})" if privacy.noise == "central" else ", enforced by the devices"
    return (
        "The coordinator saw sums of the devices' updates alone, with "
        f"{privacy.noise} noise: about ε = {privacy.epsilon:.3g} at δ = {privacy.delta:g} of the "
        f"training rows of a device that was in all {privacy.rounds} rounds{by}."
    )


def _details(facts: VersionFacts) -> str:
    return _table(
        {
            "version": facts.version,
            "state": facts.state + (f": {facts.cause}" if facts.cause else ""),
            "made (UTC)": f"{facts.created_at:%Y-%m-%d %H:%M}",
            "run": facts.run_id,
            "plan, SHA-256": facts.plan_digest,
            "started from": facts.parent or "fresh parameters",
        }
    )


def _task(task: Mapping[str, Any]) -> dict[str, object]:
    options = {str(key): value for key, value in dict(task.get("options") or {}).items()}
    return {"name": task["name"], "kind": task["uses"], **options}


def _training(facts: VersionFacts) -> str:
    counted = "only the devices know" if facts.examples is None else f"{facts.examples:,.0f}"
    training: Mapping[str, Any] = facts.plan["training"]
    return (
        "The rows never left the devices.\n\n"
        + _table({"rounds": facts.rounds, "devices": facts.devices, "rows, last round": counted})
        + "\n"
        + "\n".join(_row(key, value) for key, value in training.items())
    )


def _measured(facts: VersionFacts) -> str:
    if not facts.metrics:
        return "Not measured while it was trained."
    figures = {name: f"{value:.4f}" for name, value in facts.metrics.items()}
    return "On held-out rows of the devices, after the last round:\n\n" + _table(figures)


def _judged(judgement: Judgement | None) -> str:
    if judgement is None:
        return "No device judged these files before they were signed."
    noise = "exactly" if judgement.noise == "none" else "with noise that the devices added"
    head = (
        f"{judgement.devices} devices ran the exact files on their held-out rows, compared with "
        f"{judgement.reference}; their scores were summed {noise}.\n\n"
        "| variant | gate | | found |\n| --- | --- | --- | --- |"
    )
    rows = [
        f"| {judged.variant} | {v.gate} | {v.outcome} | {_cell(v.words)} |"
        for judged in judgement.variants
        for v in judged.verdicts
    ]
    return "\n".join([head, *rows])


def _files(facts: VersionFacts) -> str:
    head = "| variant | bytes | p50 µs | off by | |\n| --- | --- | --- | --- | --- |"
    rows = [
        "| "
        + " | ".join(
            (
                variant.variant,
                f"{variant.size_bytes:,}",
                "–" if variant.latency_p50_us is None else f"{variant.latency_p50_us:.0f}",
                "–" if variant.relative_error is None else f"{variant.relative_error:.2%}",
                "shipped" if variant.shipped else _cell(variant.cause),
            )
        )
        + " |"
        for variant in facts.variants
    ]
    return "\n".join([head, *rows])


def _notes(facts: VersionFacts) -> str:
    if not facts.notes:
        return "None."
    return "\n".join(
        f"- {note.written_at:%Y-%m-%d %H:%M}, {_cell(note.author)}: {_cell(note.text)}"
        for note in facts.notes
    )


def _table(facts: Mapping[str, object]) -> str:
    lines: Iterable[str] = (_row(name, value) for name, value in facts.items())
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _row(name: str, value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return f"| {name} | {_cell(shown)} |"


def _cell(value: object) -> str:
    """Keep a value on its line and inside its cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
