from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_agent.data_registry import DataEntry, DataRegistry
from shared.errors import ConfigError, DataError, NotFoundError
from shared.tasks.spec import TaskSpec

PUMPS = TaskSpec("pumps", "tabular", {"kind": "classification"})


def entry(name: str = "site", task: TaskSpec = PUMPS, problem: str = "") -> DataEntry:
    return DataEntry(
        name=name,
        path="/data/pumps.csv",
        task=task,
        usable_rows=100,
        skipped={"label is none of 'ok', 'failed'": 2},
        train_rows=91,
        held_out_rows=9,
        digest="ab" * 32,
        checked_at=datetime(2026, 11, 1, 12, tzinfo=UTC),
        problem=problem,
    )


def reason(registry: DataRegistry, task: TaskSpec) -> str:
    with pytest.raises(DataError) as caught:
        registry.find(task)
    return str(caught.value)


def test_an_empty_home_has_no_data(tmp_path: Path) -> None:
    registry = DataRegistry(tmp_path / "not-made-yet")

    assert list(registry.entries()) == []
    assert reason(registry, PUMPS) == "no data for task 'pumps'"


def test_entries_outlive_the_process_and_only_their_owner_may_read_them(tmp_path: Path) -> None:
    DataRegistry(tmp_path).add(entry())

    assert list(DataRegistry(tmp_path).entries()) == [entry()]
    assert (tmp_path / "data.json").stat().st_mode & 0o777 == 0o600


def test_data_are_found_by_the_exact_task(tmp_path: Path) -> None:
    registry = DataRegistry(tmp_path)
    registry.add(entry())
    registry.add(entry("cameras", TaskSpec("defects", "image-classification")))

    assert registry.find(TaskSpec("pumps", "tabular", {"kind": "classification"})) == entry()


def test_data_for_another_form_of_the_task_are_no_data_for_it(tmp_path: Path) -> None:
    registry = DataRegistry(tmp_path)
    registry.add(entry())

    assert "were added for another form of it; the owner must add them again" in reason(
        registry, TaskSpec("pumps", "tabular", {"kind": "regression"})
    )


def test_broken_data_are_not_trained_on_and_the_reason_tells_nothing_of_them(
    tmp_path: Path,
) -> None:
    registry = DataRegistry(tmp_path)
    registry.add(entry().broken("3 x label is 'secret'", at=datetime(2026, 11, 2, tzinfo=UTC)))

    assert reason(registry, PUMPS) == (
        "data for task 'pumps' failed their last check; the owner must mend them and check again"
    )


def test_adding_again_replaces_the_entry_of_that_name(tmp_path: Path) -> None:
    registry = DataRegistry(tmp_path)
    registry.add(entry())
    registry.add(entry(task=TaskSpec("defects", "image-classification")))

    assert [known.task.name for known in registry.entries()] == ["defects"]


def test_a_task_has_one_source_of_data(tmp_path: Path) -> None:
    registry = DataRegistry(tmp_path)
    registry.add(entry())

    with pytest.raises(ConfigError, match="task 'pumps' already has the data 'site'; remove"):
        registry.add(entry("another"))
    assert list(registry.entries()) == [entry()]


def test_removed_data_are_forgotten(tmp_path: Path) -> None:
    registry = DataRegistry(tmp_path)
    registry.add(entry())
    registry.remove("site")

    assert list(registry.entries()) == []
    with pytest.raises(NotFoundError, match="no data 'site' here; see `shoal-agent data list`"):
        registry.remove("site")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged (Input data was truncated); delete it and add your data again"),
        ('{"entries": [{"name": 1}]}', "is damaged (Expected `str`, got `int`"),
        ('{"version": 9}', "was written by another version of shoal-agent; install that one"),
    ],
)
def test_a_registry_that_cannot_be_read_says_what_to_do(
    tmp_path: Path, content: str, sentence: str
) -> None:
    (tmp_path / "data.json").write_text(content)

    with pytest.raises(DataError) as caught:
        DataRegistry(tmp_path).entries()

    assert sentence in str(caught.value)
