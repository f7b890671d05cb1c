"""Plans that ask for statistics: what is filled in, and what is refused."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_coordinator.rounds.plan_explanation import explain
from shared.errors import ConfigError
from shared.run_plan import RunPlan, plan_from, read_plan

ASKED: dict[str, Any] = {"of": [{"kind": "count"}, {"kind": "mean", "feature": "pressure"}]}


def plan_of(**tables: Any) -> RunPlan:
    """Read a plan that asks, as somebody wrote it."""
    document = {
        "name": "ages",
        "task": {"name": "pumps", "uses": "tabular"},
        "statistics": ASKED,
        **tables,
    }
    return plan_from(document, source="plan")


def test_statistics_are_noised_by_the_devices_where_the_plan_says_nothing_of_noise() -> None:
    assert plan_of().privacy.noise == "distributed"
    assert plan_of(privacy={"at_least": 17}).privacy.noise == "distributed"
    assert plan_of(privacy={"noise": "none"}).privacy.noise == "none"


def test_training_without_a_word_about_noise_stays_without() -> None:
    assert plan_of(statistics=None).privacy.noise == "none"


def test_what_only_training_needs_is_written_as_what_it_comes_to() -> None:
    plan = plan_of(rounds=9, evaluate=True, deploy=True, privacy={"weights": "examples"})

    assert (plan.rounds, plan.evaluate, plan.deploy) == (1, False, False)
    privacy = plan.privacy
    assert (privacy.lane_bits, privacy.rotate, privacy.weights) == (32, False, "uniform")


def test_a_plan_that_asks_survives_being_stored_and_read() -> None:
    plan = plan_of()
    stored = msgspec.json.decode(msgspec.json.encode(plan))
    assert plan_from(stored, source="stored") == plan


def test_a_plan_that_asks_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ages.toml"
    path.write_text(
        'name = "ages"\n[task]\nname = "pumps"\nuses = "tabular"\n'
        '[statistics]\nmax_rows = 50\n[[statistics.of]]\nkind = "quantiles"\n'
        'feature = "pressure"\nat = [0.5]\n'
    )
    plan = read_plan(path)
    assert plan.statistics is not None
    assert plan.statistics.max_rows == 50
    assert plan.privacy.noise == "distributed"


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"privacy": {"mode": "plain"}}, "privacy.mode 'plain' would show each device"),
        ({"privacy": {"noise": "central"}}, "write noise = 'distributed'"),
        (
            {"privacy": {"noise": "none", "adaptive_clipping": True}},
            "bounded by statistics.max_row",
        ),
        ({"aggregation": {"group_size": 20}}, r"\[aggregation\] is of updates"),
        (
            {"privacy": {"noise": "none"}, "cohort": {"size": 300}},
            "one sum of at most 256 devices, and cohort.size asks 300",
        ),
        ({"cohort": {"size": 10}}, "cohort.size 10 is below the 17 devices"),
        ({"statistics": {"of": []}}, "statistics.of"),
        ({"statistics": {"of": [{"kind": "maximum", "feature": "x"}]}}, "statistics.of"),
        ({"privacy": "none"}, "privacy"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_to_write(
    tables: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(**tables)


def test_a_quorum_binds_statistics_too() -> None:
    assert plan_of(cohort={"size": 30, "quorum": 25}).layout(grouped=False).min_survivors == 25


def test_who_starts_it_hears_how_far_noise_moves_the_answers_and_what_they_cost() -> None:
    said = "\n".join(explain(plan_of(cohort={"size": 20})))
    # √3, the norm of a weight, a count and a mean, of noise that 20 devices add and 16 suffice for.
    assert "it moves each count by about ±1,936 rows" in said
    assert "about ε = " in said
    assert "exact_sums" not in said


def test_who_starts_an_exact_one_hears_what_owners_must_allow() -> None:
    said = "\n".join(explain(plan_of(privacy={"noise": "none"})))
    assert "the answers are exact, and no ε is promised" in said
    assert "exact_sums = true" in said


def test_nobody_may_write_a_probe_into_a_plan() -> None:
    probe = {"model_sha256": "a" * 64, "columns": [["x", "high", 0.0]]}
    with pytest.raises(ConfigError, match=r"statistics\.probe is asked by a compression alone"):
        plan_of(statistics={**ASKED, "probe": probe})
