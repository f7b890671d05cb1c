"""A task that a user wrote, outside the packages, from its task file to a trained model."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data, read_local_data, read_task_spec
from edge_agent.training import evaluate, train
from shared.errors import ConfigError
from shared.run_plan import TrainingPlan
from shared.tasks.registry import load_task
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector

EXAMPLE_TASK = Path(__file__).parents[2] / "example_task"


@pytest.fixture
def moons(tmp_path: Path) -> Path:
    """A CSV file of 600 points on two interleaved half circles, with noise."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, np.pi, 600)
    lower = rng.random(600) < 0.5
    x = np.where(lower, 1 - np.cos(angles), np.cos(angles)) + rng.normal(0, 0.1, 600)
    y = np.where(lower, 0.5 - np.sin(angles), np.sin(angles)) + rng.normal(0, 0.1, 600)
    rows = [
        f"{a:.4f},{b:.4f},{'lower' if below else 'upper'}"
        for a, b, below in zip(x, y, lower, strict=True)
    ]
    path = tmp_path / "moons.csv"
    path.write_text("\n".join(["x,y,moon", *rows]))
    return path


def test_a_task_of_one_s_own_is_trained_to_98_percent(
    moons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE_TASK)
    spec = read_task_spec(str(EXAMPLE_TASK / "TASK.toml"))
    registry = DataRegistry(tmp_path / "home")
    registry.add(check_data("moons", moons, spec, now=datetime(2026, 11, 1, tzinfo=UTC)))

    data = read_local_data(Path(registry.find(spec).path), spec)
    start = to_vector(seeded_model(data.task, 0))
    update = train(data.task, start, data.train, TrainingPlan(epochs=30), seed=0)

    metrics = data.task.summarize(evaluate(data.task, update.parameters, data.held_out))
    assert metrics["accuracy"] >= 0.98
    assert data.task.primary_metric in metrics


def test_a_task_that_names_no_statistics_has_those_that_it_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE_TASK)
    task = load_task(read_task_spec(str(EXAMPLE_TASK / "TASK.toml")))

    named = task.statistics
    monkeypatch.delattr(type(task), "statistics")
    found = task.statistics

    assert set(found) == set(named)
    assert found == {"examples": 1, "loss_sum": 10, "correct": 1}


def test_a_task_that_is_not_installed_on_this_device_is_refused_with_what_to_do(
    moons: Path,
) -> None:
    spec = read_task_spec("my_moons_package.tasks:TwoMoons")

    assert spec.name == "twomoons"
    with pytest.raises(ConfigError, match="install its package on this machine or put its folder"):
        check_data("moons", moons, spec, now=datetime(2026, 11, 1, tzinfo=UTC))
