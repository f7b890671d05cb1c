"""A coordinator that went bad names code which a device's owner never agreed to."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from flwr.app import Context, RecordDict

from edge_agent.data_registry import DataEntry, DataRegistry
from edge_agent.training_app import load_from_home
from shared.errors import DataError
from shared.tasks.spec import TaskSpec

OWNERS = TaskSpec("digits", "tabular", {"labels": ["a", "b"]})
MODULE = "code_of_the_coordinator"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay the foreign module where it can be imported, and register the owner's data."""
    (tmp_path / f"{MODULE}.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    DataRegistry(tmp_path).add(
        DataEntry(
            name="mine",
            path=str(tmp_path / "rows.csv"),
            task=OWNERS,
            usable_rows=2,
            skipped={},
            train_rows=1,
            held_out_rows=1,
            digest="0" * 64,
            checked_at=datetime(2026, 11, 23, tzinfo=UTC),
        )
    )
    return tmp_path


@pytest.mark.parametrize(
    "asked",
    [
        TaskSpec("digits", f"{MODULE}:Task"),
        TaskSpec("digits", f"{MODULE}:Task", OWNERS.options),
        TaskSpec("digits", "tabular", {"labels": ["a", "b"], "data": "/etc/passwd"}),
        TaskSpec("other", f"{MODULE}:Task"),
    ],
)
def test_a_task_that_the_owner_did_not_register_is_not_imported(
    asked: TaskSpec, home: Path
) -> None:
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"home": str(home)},
        state=RecordDict(),
        run_config={"task": msgspec.json.encode(asked).decode()},
    )
    with pytest.raises(DataError, match=r"another form|no data for task"):
        load_from_home(context)
    assert MODULE not in sys.modules
