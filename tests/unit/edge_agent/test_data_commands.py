import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_agent.data_commands import app
from edge_agent.data_registry import DataEntry, DataRegistry
from shared.errors import ConfigError, DataError, NotFoundError, ShoalError

TASK = """
name = "pumps"
uses = "tabular"
[options]
kind = "classification"
target = "state"
labels = ["ok", "failed"]
features = [{ name = "pressure", minimum = 0, maximum = 10 }]
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a task file and 100 good rows, where the agent's home is ``home``."""
    (tmp_path / "task.toml").write_text(TASK)
    rows = [f"{number / 10:.1f},{'failed' if number > 90 else 'ok'}" for number in range(100)]
    (tmp_path / "pumps.csv").write_text("\n".join(["pressure,state", *rows]))
    return tmp_path


def shoal_agent_data(site: Path, *arguments: str) -> str:
    """Run the command, and return what it printed; raises what it raised."""
    result = CliRunner().invoke(
        app, [*arguments, "--home", str(site / "home")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def add(site: Path, path: str = "pumps.csv", task: str = "task.toml") -> str:
    return shoal_agent_data(site, "add", "site", str(site / path), "--task", str(site / task))


def known(site: Path) -> DataEntry:
    return DataRegistry(site / "home").get("site")


def refusal(kind: type[ShoalError], site: Path, *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        shoal_agent_data(site, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adding_shows_what_is_usable_and_remembers_it(site: Path) -> None:
    with (site / "pumps.csv").open("a") as file:
        file.write("\n3,broken\n")

    output = add(site)

    assert "data 'site' can be trained on for task 'pumps'" in output
    assert "skipped: label is none of 'ok', 'failed'" in output
    assert known(site).usable_rows == 100
    assert known(site).train_rows + known(site).held_out_rows == 100
    assert known(site).skipped == {"label is none of 'ok', 'failed'": 1}
    assert known(site).path == str(site / "pumps.csv")


def test_data_added_before_enrolling_say_what_is_still_to_do(site: Path) -> None:
    assert f"{site / 'home'} is not enrolled yet; 'shoal-agent enroll --home" in add(site)


def test_data_that_break_the_contract_are_refused_and_nothing_is_remembered(site: Path) -> None:
    (site / "other.csv").write_text("pressure,state\n1,broken\n2,gone\n")

    with pytest.raises(DataError, match="2 of 2 rows break the contract"):
        add(site, "other.csv")

    assert list(DataRegistry(site / "home").entries()) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('name = "x"\nuse = "tabular"', "unknown key 'use' at the top; did you mean 'uses'?"),
        ('name = "x"', "key 'uses' is missing at the top; add it"),
        ('name = "A B"\nuses = "tabular"', "name: expected `str` matching regex"),
        ("name = ", "is not valid TOML"),
        (TASK.replace("kind =", "sort ="), "unknown key 'sort' at the top"),
        (TASK.replace('"tabular"', '"tables"'), "no task 'tables' is installed here"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_refused(site: Path, text: str, sentence: str) -> None:
    (site / "task.toml").write_text(text)

    with pytest.raises(ConfigError) as caught:
        add(site)

    assert sentence in str(caught.value)


def test_a_task_file_that_is_not_there_is_named(site: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.toml: No such file"):
        add(site, task="nothing.toml")


def test_a_task_without_options_may_be_named_by_its_reference(site: Path) -> None:
    assert "options of tabular: key 'kind' is missing at the top; add it" in refusal(
        ConfigError, site, "add", "site", str(site / "pumps.csv"), "--task", "tabular"
    )


@pytest.mark.parametrize("name", ["My Data", "-x", "a" * 64])
def test_a_name_that_cannot_be_used_is_refused(site: Path, name: str) -> None:
    arguments = ["add", "--task", str(site / "task.toml"), "--", name, str(site / "pumps.csv")]

    result = CliRunner().invoke(app, ["add", "--home", str(site / "home"), *arguments[1:]])

    assert isinstance(result.exception, ConfigError)
    assert "cannot name data; use up to 63 lower-case letters" in str(result.exception)


def test_checking_unchanged_data_says_so(site: Path) -> None:
    add(site)
    before = known(site)

    assert "data 'site' are unchanged since" in shoal_agent_data(site, "check", "site")
    assert known(site).digest == before.digest
    assert known(site).checked_at >= before.checked_at


def test_checking_grown_data_tells_what_changed_and_remembers_it(site: Path) -> None:
    add(site)
    with (site / "pumps.csv").open("a") as file:
        file.write("\n3,ok\n")

    assert "100 usable rows became 101" in shoal_agent_data(site, "check", "site")
    assert known(site).usable_rows == 101


def test_checking_broken_data_stops_training_until_they_are_mended(site: Path) -> None:
    add(site)
    good = (site / "pumps.csv").read_text()
    (site / "pumps.csv").write_text("time,state\n1,ok\n")

    assert "has no column 'pressure'" in refusal(DataError, site, "check", "site")
    with pytest.raises(DataError, match="failed their last check"):
        DataRegistry(site / "home").find(known(site).task)
    assert "broken" in shoal_agent_data(site, "list")

    (site / "pumps.csv").write_text(good)
    assert "data 'site' are usable again" in shoal_agent_data(site, "check", "site")
    assert DataRegistry(site / "home").find(known(site).task).usable_rows == 100


def test_data_are_listed_and_removed(site: Path) -> None:
    assert "no data yet; add some with" in shoal_agent_data(site, "list")
    add(site)

    assert "pumps" in shoal_agent_data(site, "list")
    assert "their files were not touched" in shoal_agent_data(site, "remove", "site")
    assert (site / "pumps.csv").exists()
    assert "no data 'site' here" in refusal(NotFoundError, site, "check", "site")


def test_few_rows_of_which_none_is_held_out_are_pointed_out(site: Path) -> None:
    (site / "pumps.csv").write_text("pressure,state\n1,ok\n")

    assert "this device will train but not measure" in add(site)


def test_the_daemon_can_import_the_commands_without_what_training_needs() -> None:
    program = (
        "import sys, edge_agent.data_commands, edge_agent.data_registry\n"
        "heavy = {'torch', 'flwr', 'onnx', 'fastapi', 'sqlalchemy', 'pandas', 'scipy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.strip() == "[]"
