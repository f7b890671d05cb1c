import sys
from pathlib import Path

import pytest

from shared.config import read_toml
from shared.errors import ConfigError
from shared.tasks.image_classification import ImageClassification
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec

EXAMPLE_TASK = Path(__file__).parents[2] / "example_task"
IMAGES = {"height": 28, "width": 28, "labels": ["a", "b"]}


def refusal(uses: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_task(TaskSpec("mine", uses, options))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_built_in_task_is_found_by_its_entry_point() -> None:
    task = load_task(TaskSpec("fashion", "image-classification", IMAGES))

    assert isinstance(task, ImageClassification)
    assert task.labels == ("a", "b")


def test_a_task_of_one_s_own_is_found_by_module_and_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE_TASK)

    task = load_task(read_toml(EXAMPLE_TASK / "TASK.toml", TaskSpec))

    assert type(task).__name__ == "TwoMoons"
    assert task.contract.feature_names == ["x", "y"]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    sentence = refusal("image-clasification")

    assert "no task 'image-clasification' is installed here" in sentence
    assert "image-classification, tabular" in sentence
    assert "install the package that offers it, or write module:object" in sentence


@pytest.mark.parametrize("uses", ["no_such_module_anywhere:Task", ":Task"])
def test_a_module_that_cannot_be_imported_must_be_installed(uses: str) -> None:
    sentence = refusal(uses)

    assert f"task '{uses}' cannot be imported" in sentence
    assert "install its package on this machine or put its folder on PYTHONPATH" in sentence


def test_an_object_that_the_module_lacks_is_named() -> None:
    assert "has no attribute 'Images'; write module:object" in refusal(
        "shared.tasks.image_classification:Images"
    )


@pytest.mark.parametrize("uses", ["shared.tasks.spec:TaskSpec", "shared.tasks.spec:hashlib", "os:"])
def test_something_that_is_no_task_is_refused(uses: str) -> None:
    assert any(
        reason in refusal(uses) for reason in ("is no task; name a subclass", "cannot be found")
    )


def test_an_unfinished_task_is_told_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfinished_task.py").write_text(
        "from shared.tasks.task import Task\n"
        "class Unfinished(Task):\n"
        "    @classmethod\n"
        "    def from_options(cls, options):\n"
        "        return cls()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    sentence = refusal("unfinished_task:Unfinished")
    del sys.modules["unfinished_task"]

    assert "task 'unfinished_task:Unfinished' is unfinished" in sentence
    assert "build_model" in sentence


def test_an_option_that_does_not_exist_is_refused_with_a_guess() -> None:
    assert refusal("image-classification", **IMAGES, chanels=1) == (
        "options of image-classification: unknown key 'chanels' at the top; "
        "did you mean 'channels'?"
    )


def test_an_option_of_the_wrong_type_is_refused_by_name() -> None:
    assert refusal("image-classification", **IMAGES | {"height": "28"}) == (
        "options of image-classification: height: expected `int`, got `str`; "
        "change it and try again"
    )
