"""Plans of rollouts: what is refused, and when waves may open."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.rollout_plan import RolloutPlan, WavePlan, WindowPlan, plan_of, read_rollout_plan

ALL = {"percent": 100}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"waves": []}, "a rollout needs a wave"),
        ({"waves": [{}]}, "a wave needs devices or percent"),
        ({"waves": [{"devices": 1, "percent": 100}]}, "a wave needs devices or percent"),
        ({"waves": [{"devices": 1}]}, "the last wave must have percent = 100"),
        ({"waves": [{"percent": 100, "where": {"device": "a*"}}]}, "and no where"),
        ({"waves": [{"percent": 50}, {"percent": 20}, ALL]}, "waves grow"),
        ({"waves": [{"devices": 5}, {"percent": 20}, {"devices": 3}, ALL]}, "waves grow"),
        ({"waves": [ALL], "windows": [{"start": "25:00", "end": "05:00"}]}, "windows.*start"),
        ({"waves": [ALL], "windows": [{"start": "05:00", "end": "05:00"}]}, "a window needs"),
        (
            {"waves": [ALL], "windows": [{"start": "01:00", "end": "05:00", "zone": "Mars/Base"}]},
            "there is no time zone 'Mars/Base' here",
        ),
        ({"waves": [{"percent": 100, "where": {"shoe": "a"}}]}, "shoe"),
        ({"waves": [ALL], "gates": {"max_crash": 1}}, "did you mean 'max_crashes'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_sentence(
    document: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_of(document)


def test_a_file_is_read_with_all_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "rollout.toml"
    path.write_text(
        'on_breach = "pause"\n[[waves]]\ndevices = 1\nwhere = { device = "lab-*" }\n'
        '[[waves]]\npercent = 100\n[[windows]]\nstart = "22:00"\nend = "05:00"\ndays = ["fri"]\n'
    )
    plan = read_rollout_plan(path)
    assert plan.waves[0] == WavePlan(devices=1, where={"device": "lab-*"})
    assert plan.windows[0].days == ("fri",)
    assert plan.on_breach == "pause"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("window", "now", "opens"),
    [
        (WindowPlan(start="02:00", end="05:00"), "2026-03-02 03:00", "2026-03-02 03:00"),
        (WindowPlan(start="02:00", end="05:00"), "2026-03-02 05:00", "2026-03-03 02:00"),
        (WindowPlan(start="22:00", end="05:00"), "2026-03-02 04:59", "2026-03-02 04:59"),
        (WindowPlan(start="22:00", end="05:00"), "2026-03-02 12:00", "2026-03-02 22:00"),
        # 2026-03-02 is a Monday; Friday's window lasts into Saturday.
        (WindowPlan(start="22:00", end="05:00", days=("fri",)), "2026-03-07 01:00", None),
        (
            WindowPlan(start="22:00", end="05:00", days=("fri",)),
            "2026-03-07 06:00",
            "2026-03-13 22:00",
        ),
        (
            WindowPlan(start="02:00", end="05:00", zone="Europe/Berlin"),
            "2026-07-01 12:00",
            "2026-07-02 00:00",
        ),
    ],
)
def test_a_window_opens_on_its_days_in_its_zone(
    window: WindowPlan, now: str, opens: str | None
) -> None:
    assert window.opens(at(now)) == at(opens or now)


def test_the_earliest_of_several_windows_counts() -> None:
    plan = RolloutPlan(
        waves=(WavePlan(percent=100),),
        windows=(WindowPlan(start="20:00", end="21:00"), WindowPlan(start="14:00", end="15:00")),
    )
    assert plan.opens(at("2026-03-02 12:00")) == at("2026-03-02 14:00")
    assert plan.opens(at("2026-03-02 14:30")) == at("2026-03-02 14:30")
