"""The report of one version: a page of its own, with no script and nothing from elsewhere; pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from cloud_coordinator.models.card import privacy_sentence
from cloud_coordinator.models.catalogue import VariantFacts, VersionFacts
from cloud_coordinator.models.judgement import Judgement
from shared.judging import GAIN, MEAN, WORST_DECILE

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 130, 20, 50
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #c8d0da;
  --good: #12715b; --ship: #0b57d0; --bad: #b3261e; --soft: #5b6675; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --paper: #12161c; --line: #3a4452;
  --good: #5fd3b3; --ship: #8ab4ff; --bad: #ff8a80; --soft: #9aa6b5; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.sub { color: var(--soft); margin-top: .2rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td:first-child { white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.passed { color: var(--good); } .shipped { color: var(--ship); font-weight: 600; }
.held { color: var(--bad); }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg text.soft { fill: var(--soft); } svg line { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--soft); stroke-dasharray: 4 4; }
svg circle.passed { fill: var(--good); } svg circle.shipped { fill: var(--ship); }
svg circle.held { fill: none; stroke: var(--bad); stroke-width: 2; }
"""


def report(facts: VersionFacts, steps: Mapping[str, str]) -> str:
    """Return the page of a version.

    Args:
        facts: all that is known of it.
        steps: of its compression, in their order, each with what came of it in words.
    """
    parts = [
        f"<h1>{escape(facts.model)}</h1>",
        f'<p class="sub">version {escape(facts.version)}, {escape(facts.state)}</p>',
        *([f"<p>{escape(facts.cause)}</p>"] if facts.cause else []),
        "<h2>Size against time</h2>",
        _plot(facts.variants),
        "<h2>Files</h2>",
        _files(facts.variants),
        *_judged(facts.judgement),
        *_made(steps),
        "<h2>Where it comes from</h2>",
        _table(("", ""), _lineage(facts)),
        f"<p>{escape(privacy_sentence(facts.privacy))}</p>",
    ]
    title = f"{escape(facts.model)}, version {escape(facts.version[:12])}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def pareto(variants: Iterable[VariantFacts]) -> list[VariantFacts]:
    """Return the variants than which no other that passed is both smaller and faster."""
    front: list[VariantFacts] = []
    timed = [v for v in variants if v.passed and v.latency_p50_us]
    for variant in sorted(timed, key=lambda v: (v.size_bytes, _latency(v))):
        if not front or _latency(variant) < _latency(front[-1]):
            front.append(variant)
    return front


# --- the plot ------------------------------------------------------------------------------------


def _plot(variants: Sequence[VariantFacts]) -> str:
    """Draw every file that runs, on logarithmic axes; what is left and low is better."""
    shown = [v for v in variants if v.size_bytes and v.latency_p50_us]
    if not shown:
        return "<p>No file was measured.</p>"
    x = _Axis([v.size_bytes for v in shown], start=_LEFT, end=_WIDTH - _RIGHT)
    y = _Axis([_latency(v) for v in shown], start=_HEIGHT - _BOTTOM, end=_TOP)
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    marks = [
        f'<line x1="{_LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>',
        f'<line x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{floor}"/>',
        f'<text class="soft" x="{right}" y="{_HEIGHT - 8}" text-anchor="end">bytes</text>',
        f'<text class="soft" x="4" y="{_TOP - 6}">µs, one row</text>',
    ]
    for value in x.ticks:
        at = f"{x.at(value):.1f}"
        marks.append(f'<line x1="{at}" y1="{floor}" x2="{at}" y2="{floor + 5}"/>')
        marks.append(f'<text x="{at}" y="{floor + 20}" text-anchor="middle">{_short(value)}</text>')
    for value in y.ticks:
        at = f"{y.at(value):.1f}"
        marks.append(f'<line x1="{_LEFT - 5}" y1="{at}" x2="{_LEFT}" y2="{at}"/>')
        marks.append(f'<text x="{_LEFT - 9}" y="{at}" dy="4" text-anchor="end">{value:g}</text>')
    front = pareto(shown)
    line = " ".join(f"{x.at(v.size_bytes):.1f},{y.at(_latency(v)):.1f}" for v in front)
    marks.append(f'<polyline points="{line}"/>')
    marks += _points(shown, x, y)
    caption = "Size and time of each file"
    if len(front) == 1:
        caption += f"; none beats {escape(front[0].variant)} in either"
    elif front:
        caption += "; the dashed line joins those that no other one beats in both"
    return (
        f'<div class="scroll"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{caption}">' + "".join(marks) + f"</svg></div>\n<p class='sub'>{caption}. "
        "Left and low is better; hollow ones were held back.</p>"
    )


def _points(shown: Sequence[VariantFacts], x: "_Axis", y: "_Axis") -> list[str]:
    """Draw the points, and write their names so that no two overlap."""
    marks, taken, margin = [], list[float](), _WIDTH - _RIGHT + 12
    for variant in sorted(shown, key=lambda v: -_latency(v)):
        left, top = x.at(variant.size_bytes), y.at(_latency(variant))
        label = top
        while any(abs(label - other) < 15 for other in taken):
            label += 1
        taken.append(label)
        marks.append(f'<circle class="{_class(variant)}" cx="{left:.1f}" cy="{top:.1f}" r="6"/>')
        marks.append(
            f'<line x1="{left + 6:.1f}" y1="{top:.1f}" x2="{margin - 4}" y2="{label:.1f}"/>'
        )
        marks.append(f'<text x="{margin}" y="{label:.1f}" dy="4">{escape(variant.variant)}</text>')
    return marks


class _Axis:
    """A logarithmic scale that holds all its values with some room on either side."""

    def __init__(self, values: Sequence[float], *, start: float, end: float) -> None:
        low, high = min(values) / 1.3, max(values) * 1.3
        self._low, self._span = math.log(low), math.log(high) - math.log(low)
        self._start, self._length = start, end - start
        self.ticks = _ticks(low, high)

    def at(self, value: float) -> float:
        return self._start + self._length * (math.log(value) - self._low) / self._span


def _ticks(low: float, high: float) -> list[float]:
    """Return round values between two, from the coarsest steps that give at least two."""
    for mantissas in ((1, 2, 5), range(1, 10), [n / 10 for n in range(10, 100)]):
        steps = (float(f"{m}e{e}") for e in range(-3, 12) for m in mantissas)
        found = [value for value in steps if low <= value <= high]
        if len(found) > 1:
            break
    return found


# --- tables --------------------------------------------------------------------------------------


def _files(variants: Sequence[VariantFacts]) -> str:
    whole = next((v.size_bytes for v in variants if v.variant == "fp32"), 0)
    rows = [
        (
            escape(v.variant),
            f"{v.size_bytes:,}" if v.size_bytes else "–",
            f"{whole / v.size_bytes:.2f}" if whole and v.size_bytes else "–",
            "–" if v.latency_p50_us is None else f"{v.latency_p50_us:.0f}",
            "–" if v.relative_error is None else f"{v.relative_error:.2%}",
            f'<span class="{_class(v)}">{escape(_outcome(v))}</span>',
        )
        for v in variants
    ]
    head = ("variant", "bytes", "× smaller", "p50 µs", "off by", "")
    return _table(head, rows, numbers=(1, 2, 3, 4))


def _judged(judgement: Judgement | None) -> list[str]:
    if judgement is None:
        return ["<h2>Judged on devices</h2>", "<p>No device judged these files.</p>"]
    scores = {answer.feature: answer for answer in judgement.answers}
    mean = next(a.values[MEAN] for a in judgement.answers if MEAN in a.values)
    noise = "exactly" if judgement.noise == "none" else "with noise that the devices added"
    rows = []
    for judged in judgement.variants:
        values, errors = scores[judged.variant].values, scores[judged.variant].standard_error
        gain = values.get(GAIN, 0.0)
        words = judged.objection or "passed"
        style = "passed" if judged.passed else "held"
        rows.append(
            (
                escape(judged.variant),
                f"{mean + gain:.4f}",
                f"{gain:+.4f}{_error(errors.get(GAIN))}",
                f"{values[WORST_DECILE]:.3f}{_error(errors.get(WORST_DECILE))}",
                f'<span class="{style}">{escape(words)}</span>',
            )
        )
    how = (
        f"{judgement.devices} devices ran these very files on their held-out rows, compared with "
        f"{judgement.reference}; the scores were summed {noise}."
    )
    return [
        "<h2>Judged on devices</h2>",
        f"<p>{escape(how)}</p>",
        _table(("variant", "score", "gain", "worst tenth", ""), rows, numbers=(1, 2, 3)),
    ]


def _error(standard_error: float | None) -> str:
    return f" ± {standard_error:.4f}" if standard_error else ""


def _made(steps: Mapping[str, str]) -> list[str]:
    if not steps:
        return []
    rows = [(escape(step), escape(words)) for step, words in steps.items()]
    return ["<h2>How it was made</h2>", _table(("step", "what came of it"), rows)]


def _lineage(facts: VersionFacts) -> list[tuple[str, str]]:
    figures = {name: f"{value:.4f}" for name, value in facts.metrics.items()}
    rows = {
        "run": facts.run_id,
        "rounds": str(facts.rounds),
        "devices": str(facts.devices),
        "rows, last round": "–" if facts.examples is None else f"{facts.examples:,.0f}",
        "measured after the last round": ", ".join(f"{k} {v}" for k, v in figures.items()) or "–",
        "task": f"{facts.plan['task']['name']} ({facts.plan['task']['uses']})",
        "plan, SHA-256": facts.plan_digest,
        "started from": facts.parent or "fresh parameters",
        "made (UTC)": f"{facts.created_at:%Y-%m-%d %H:%M}",
    }
    return [(escape(name), escape(value)) for name, value in rows.items()]


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
) -> str:
    """Lay out cells that are escaped already."""
    number = ' class="number"'

    def row(cells: Sequence[str], tag: str) -> str:
        inner = (
            f"<{tag}{number if column in numbers else ''}>{cell}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(inner)}</tr>"

    top = row(head, "th") if any(head) else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _class(variant: VariantFacts) -> str:
    if variant.shipped:
        return "shipped"
    return "passed" if variant.passed else "held"


def _outcome(variant: VariantFacts) -> str:
    if variant.shipped:
        return "shipped"
    return "passed" if variant.passed else variant.cause


def _latency(variant: VariantFacts) -> float:
    assert variant.latency_p50_us is not None
    return variant.latency_p50_us


def _short(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
