"""The page about one version: what it shows, and that nothing in it can run or overlap."""

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from cloud_coordinator.compression.report import pareto, report
from cloud_coordinator.models.catalogue import PrivacySpent, VariantFacts, VersionFacts
from cloud_coordinator.models.judgement import Judged, Judgement, Verdict
from shared.judging import GAIN, MEAN, SCORE, WORST_DECILE
from shared.statistics.vectors import Answer

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "line", "circle", "polyline"}


def variant(name: str, size: int, p50_us: float | None, **fields: Any) -> VariantFacts:
    fixed: dict[str, Any] = {
        "shipped": False,
        "passed": True,
        "cause": "",
        "relative_error": 0.01,
        **fields,
    }
    return VariantFacts(variant=name, size_bytes=size, latency_p50_us=p50_us, **fixed)


FP32 = variant("fp32", 400_000, 32.0)
SMALL = variant("int8-weights", 100_000, 31.0, shipped=True)
SLOW = variant("int8-vnni", 110_000, 60.0, passed=False, cause="latency: 1.9 times")
BROKEN = variant("int8-arm", 0, None, passed=False, cause="the converter failed")


def judged(name: str, gain: float | None, objection: str = "") -> tuple[Answer, Judged]:
    figures = {MEAN: 0.9} if gain is None else {GAIN: gain}
    errors = {} if gain is None else {GAIN: 0.002, WORST_DECILE: 0.03}
    outcome: Any = "fail" if objection else "pass"
    verdict = Verdict(gate="latency", outcome=outcome, words=objection)
    return (
        Answer(SCORE, name, {**figures, WORST_DECILE: 0.8}, errors),
        Judged(variant=name, verdicts=(verdict,)),
    )


def facts(**changes: Any) -> VersionFacts:
    pairs = [judged("fp32", None), judged("int8-weights", -0.003), judged("int8-vnni", 0.0, "slow")]
    whole = VersionFacts(
        version="a" * 64,
        model="fashion",
        state="current",
        cause="",
        created_at=datetime(2026, 3, 1, tzinfo=UTC),
        parent=None,
        run_id="nightly-1",
        rounds=10,
        plan={"task": {"name": "fashion", "uses": "image-classification"}},
        plan_digest="b" * 64,
        devices=20,
        examples=1234.0,
        metrics={"accuracy": 0.87},
        privacy=PrivacySpent(mode="secure", noise="none", epsilon=None, delta=None, rounds=10),
        variants=(FP32, SMALL, SLOW, BROKEN),
        judgement=Judgement(
            run_id="nightly-1-judge",
            reference="version 123456789abc",
            noise="distributed",
            devices=20,
            answers=tuple(answer for answer, _ in pairs),
            variants=tuple(each for _, each in pairs),
            ship="int8-weights",
        ),
        notes=(),
    )
    return msgspec.structs.replace(whole, **changes)


class Nesting(HTMLParser):
    """Finds tags that are not closed where they should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


STEPS = {"distil": "small-cnn trained by run nightly-1-distil: accuracy 0.8700"}


@pytest.mark.parametrize(
    "version",
    [
        facts(),
        facts(judgement=None, metrics={}, examples=None),
        facts(variants=()),
        facts(variants=(BROKEN,)),
        facts(variants=(FP32,)),
        facts(variants=(FP32, msgspec.structs.replace(SMALL, size_bytes=400_000))),
    ],
)
def test_the_page_is_whole_whatever_is_missing(version: VersionFacts) -> None:
    page = report(version, STEPS)
    checked = Nesting()
    checked.feed(page)
    assert checked.open == []
    assert "nan" not in page


def test_the_page_tells_what_is_known() -> None:
    page = report(facts(), STEPS)
    for words in (
        "a" * 64, "400,000", "4.00", "the converter failed", "20 devices ran these very files",
        "version 123456789abc", "with noise that the devices added", "-0.0030 ± 0.0020",
        "0.800 ± 0.0300", "0.8970",
        "latency: slow", "nightly-1-distil", "1,234", "accuracy 0.8700", "exact: no ε is promised",
    ):  # fmt: skip
        assert words in page


def test_nothing_that_people_or_devices_wrote_is_taken_for_markup() -> None:
    odd = facts(
        model=EVIL,
        cause=EVIL,
        run_id=EVIL,
        plan={"task": {"name": EVIL, "uses": EVIL}},
        metrics={EVIL: 1.0},
        variants=(msgspec.structs.replace(SLOW, variant=EVIL, cause=EVIL),),
    )
    page = report(odd, {"distil": EVIL})
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_the_page_fetches_nothing() -> None:
    assert not re.search(r"https?://|src=|href=|url\(|@import", report(facts(), STEPS))


def test_the_front_holds_what_no_other_file_beats_in_both() -> None:
    tiny = variant("tiny", 50_000, 40.0)
    assert [v.variant for v in pareto([FP32, SMALL, SLOW, BROKEN, tiny])] == [
        "tiny",
        "int8-weights",
    ]
    assert pareto([BROKEN]) == []


def test_names_in_the_plot_do_not_overlap() -> None:
    many = tuple(variant(f"file-{n}", 1000 + n, 30.0) for n in range(8))
    page = report(facts(variants=many), {})
    heights = [float(y) for y in re.findall(r'<text x="602" y="([\d.]+)" dy="4">file', page)]
    assert len(heights) == 8
    gaps = [b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)]
    assert min(gaps) >= 15


@pytest.mark.parametrize("times", [(31.0, 32.0, 33.0), (30.0,), (0.4, 0.5), (3.0, 900.0)])
@pytest.mark.parametrize("size", [700_000, 31, 10**9])
def test_both_axes_have_numbers(times: tuple[float, ...], size: int) -> None:
    files = tuple(variant(f"file-{n}", size, each) for n, each in enumerate(times))
    page = report(facts(variants=files), {})
    assert len(re.findall(r'text-anchor="middle">[\d.]+', page)) >= 2
    assert len(re.findall(r'dy="4" text-anchor="end">[\d.]+', page)) >= 2
