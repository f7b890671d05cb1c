from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.run_plan import read_plan

TASK = 'name = "fashion"\nuses = "image-classification"\n[options]\nmodel = "lenet-5"\n'
PLAN = 'name = "first"\nrounds = 3\ntask = "tasks/fashion.toml"\n'


def write(folder: Path, plan: str) -> Path:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "fashion.toml").write_text(TASK)
    (folder / "plan.toml").write_text(plan)
    return folder / "plan.toml"


def test_a_plan_may_name_the_task_file_that_owners_use(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, PLAN))
    assert plan.task.name == "fashion"
    assert plan.task.options == {"model": "lenet-5"}


def test_a_table_and_a_file_give_the_same_plan(tmp_path: Path) -> None:
    by_file = read_plan(write(tmp_path, PLAN))
    table = '[task]\nname = "fashion"\nuses = "image-classification"\noptions.model = "lenet-5"\n'
    (tmp_path / "table.toml").write_text(PLAN.replace('task = "tasks/fashion.toml"\n', "") + table)
    assert read_plan(tmp_path / "table.toml").digest == by_file.digest


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("round = 3\n", "unknown key 'round' at the top; did you mean 'rounds'?"),
        ('rounds = "three"\n', "rounds: expected `int`, got `str`; change it and try again"),
        ("[cohort]\nquorom = 1\n", "unknown key 'quorom' in [cohort]; did you mean 'quorum'?"),
        (
            "[cohort]\nsize = 2\nquorum = 3\n",
            "cohort.quorum 3 is above cohort.size 2; a round could never commit: lower the quorum",
        ),
        ("rounds = \n", "is not valid TOML"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, line: str, sentence: str
) -> None:
    plan = write(tmp_path, 'name = "first"\ntask = "tasks/fashion.toml"\n' + line)
    with pytest.raises(ConfigError) as refusal:
        read_plan(plan)
    assert sentence in str(refusal.value)


def test_a_task_file_that_is_missing_is_named(tmp_path: Path) -> None:
    plan = write(tmp_path, 'name = "first"\ntask = "tasks/another.toml"\n')
    with pytest.raises(ConfigError, match=r"another\.toml.*check the path"):
        read_plan(plan)
