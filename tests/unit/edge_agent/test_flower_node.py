import msgspec
import pytest

from edge_agent.flower_node import CLIENT_APP, agree
from shared.errors import DataError
from shared.tasks.spec import TaskSpec

TASK = TaskSpec("pumps", "tabular", {"model": "linear"})


def config(task: TaskSpec) -> dict[str, str]:
    return {"task": msgspec.json.encode(task).decode()}


def test_the_task_that_was_agreed_to_is_served() -> None:
    agree(TASK, CLIENT_APP, components={"clientapp": CLIENT_APP}, run_config=config(TASK))


@pytest.mark.parametrize("named", ["os:system", "", None])
def test_no_other_app_is_run(named: str | None) -> None:
    with pytest.raises(DataError, match="nothing but 'edge_agent"):
        agree(TASK, CLIENT_APP, components={"clientapp": named}, run_config=config(TASK))


def test_the_same_name_with_other_options_is_another_task() -> None:
    other = TaskSpec("pumps", "tabular", {"model": "mlp"})
    with pytest.raises(DataError, match="agreed to 'pumps' with other options"):
        agree(TASK, CLIENT_APP, components={"clientapp": CLIENT_APP}, run_config=config(other))


@pytest.mark.parametrize("run_config", [{}, {"task": "[]"}, {"task": 3}])
def test_a_run_without_a_task_is_refused(run_config: dict[str, object]) -> None:
    with pytest.raises(DataError, match="names no task"):
        agree(TASK, CLIENT_APP, components={"clientapp": CLIENT_APP}, run_config=run_config)
