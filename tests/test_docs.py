"""What exists is documented: settings, routes, messages and states."""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import get_args

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from cloud_coordinator.compression.api import router as compressions
from cloud_coordinator.compression.steps import Step
from cloud_coordinator.devices.api import router as devices
from cloud_coordinator.devices.membership_api import router as membership
from cloud_coordinator.health import router as health
from cloud_coordinator.models.api import router as models
from cloud_coordinator.models.lifecycle import TRANSITIONS as VERSION_TRANSITIONS
from cloud_coordinator.models.lifecycle import VersionState
from cloud_coordinator.models.static_int8 import KINDS
from cloud_coordinator.rollouts.api import router as rollouts
from cloud_coordinator.rollouts.lifecycle import TRANSITIONS, RolloutState
from cloud_coordinator.rounds.lifecycle import RoundState
from cloud_coordinator.runs.api import router as runs
from cloud_coordinator.runs.lifecycle import RunState
from cloud_coordinator.runs.recruitment import InvitationState
from cloud_coordinator.settings import Settings
from cloud_coordinator.trust.api import router as trust
from edge_agent.settings import AgentSettings
from shared.compression_plan import CompressionPlan, DistilPlan
from shared.judge_plan import JudgePlan
from shared.messages import DOWN, UP, Body, DeploymentState
from shared.privacy_plan import AggregationPlan, PrivacyPlan
from shared.rollout_plan import GatePlan, RolloutPlan, WavePlan, WindowPlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.statistics.questions import Statistic, StatisticsQuestion
from tests.diagrams import draw

DOCS = Path(__file__).parent.parent / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_setting_is_documented() -> None:
    wanted = [f"`SHOAL_{name.upper()}`" for name in Settings.model_fields]
    wanted += [f"`SHOAL_AGENT_{name.upper()}`" for name in AgentSettings.model_fields]
    assert not [setting for setting in wanted if setting not in page("operation.md")]


@pytest.mark.parametrize(
    "struct",
    [
        RunPlan,
        TrainingPlan,
        CohortPlan,
        PrivacyPlan,
        AggregationPlan,
        CompressionPlan,
        DistilPlan,
        JudgePlan,
        RolloutPlan,
        WavePlan,
        WindowPlan,
        GatePlan,
    ],
)
def test_every_key_of_a_plan_is_documented(struct: type) -> None:
    sections = {"training", "cohort", "privacy", "aggregation", "statistics"}
    sections |= {
        "compression",
        "distil",
        "judge",
        "judgement",
        "student",
        "rollout",
        "waves",
        "windows",
        "gates",
    }
    plan = page("operation.md").split("## A plan")[1].split("## Statistics")[0]
    keys = set(struct.__struct_fields__) - sections - {"strategy"}  # type: ignore[attr-defined]
    pages = plan + page("models.md").split("## Rollouts")[1]
    assert not [key for key in keys if f"\n{key} = " not in pages]


def test_every_statistic_is_documented_with_all_its_keys() -> None:
    section = page("operation.md").split("## Statistics")[1].split("## Settings")[0]
    for name in set(StatisticsQuestion.__struct_fields__) - {"probe"}:  # no person may write it
        assert f"\n{name} = " in section or f"statistics.{name}]]" in section
    for statistic in get_args(Statistic):
        kind = statistic.__struct_config__.tag
        (row,) = [line for line in section.splitlines() if line.startswith(f"| `{kind}` |")]
        shared = {"minimum", "maximum"}  # of all that have a range, said once below
        missing = [
            k for k in statistic.__struct_fields__ if k not in shared and f"`{k}`" not in row
        ]
        assert not missing
        assert all(f"`{key}`" in section for key in shared)


@pytest.mark.parametrize(
    "router", [compressions, devices, health, membership, models, rollouts, runs, trust]
)
def test_every_route_is_documented(router: APIRouter) -> None:
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    assert routes
    wanted = [f"`{method} {route.path}`" for route in routes for method in route.methods or ()]
    assert not [route for route in wanted if route not in page("operation.md")]


@pytest.mark.parametrize("body", [*UP, *DOWN])
def test_every_message_is_documented(body: type[Body]) -> None:
    assert f"| `{body.__struct_config__.tag}` |" in page("control.md")


@pytest.mark.parametrize(
    "states",
    [RunState, RoundState, InvitationState, VersionState, RolloutState, DeploymentState],
)
def test_every_state_is_documented(states: type[StrEnum]) -> None:
    assert not [state for state in states if f"`{state.value}`" not in page("control.md")]


def test_every_step_of_a_compression_is_documented() -> None:
    assert not [step for step in Step if f"| `{step.value}` |" not in page("models.md")]


def test_every_variant_is_documented_with_what_it_needs() -> None:
    for kind in KINDS:
        (row,) = [x for x in page("models.md").splitlines() if x.startswith(f"| `{kind.name}` |")]
        assert all(f"`{need}`" in row for need in kind.needs)


@pytest.mark.parametrize("table", [VERSION_TRANSITIONS, TRANSITIONS])
def test_the_pages_diagrams_are_what_the_tables_say(
    table: Mapping[StrEnum, Mapping[StrEnum, StrEnum]],
) -> None:
    assert draw(table) in page("models.md")


def test_every_test_that_the_threat_table_names_exists() -> None:
    tests = Path(__file__).parent
    code = "".join(path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page("privacy.md")))
    assert named
    assert not [name for name in sorted(named) if f"def {name}(" not in code]
