"""What a device does when a smaller network is to learn from a trained one."""

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data
from edge_agent.training import Teacher, evaluate, train
from edge_agent.training_app import app, device_seed, load_from_home
from shared.errors import ConfigError, PeerError
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.secure_sum.questions import base_digest_of, evaluation_question, training_question
from shared.student_plan import Distillation, StudentPlan, encode_student
from shared.tasks.examples import Examples
from shared.tasks.image_classification import ImageClassification
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.task import Task, seeded_model
from shared.tasks.vectors import to_vector
from tests.enrolled_homes import ALL_MAY_LEAVE, enrol_homes

STATES = TaskSpec(
    "states",
    "tabular",
    {
        "kind": "classification",
        "model": "mlp",
        "hidden": 16,
        "features": [{"name": "x", "minimum": -1, "maximum": 1}],
        "target": "state",
        "labels": ["low", "middle", "high"],
    },
)
LINE = TaskSpec(
    "line",
    "tabular",
    {
        "kind": "regression",
        "model": "mlp",
        "features": [{"name": "x", "minimum": -1, "maximum": 1}],
        "target": "y",
        "target_minimum": -5,
        "target_maximum": 5,
    },
)
PLAN = TrainingPlan(epochs=20, batch_size=8, learning_rate=0.1)


def start_of(task: Task) -> Vector:
    return to_vector(seeded_model(task, 0))


def rows(count: int = 120) -> Examples:
    x = np.linspace(-1, 1, count, dtype=np.float32)[:, np.newaxis]
    return Examples(x, np.digitize(x[:, 0], (-0.3, 0.3)).astype(np.int64))


def trained_teacher(weight: float) -> Teacher:
    task = load_task(STATES)
    update = train(task, start_of(task), rows(), PLAN, seed=1)
    return Teacher(task, update.parameters, 4.0, weight)


@pytest.mark.parametrize("spec", [STATES, LINE])
def test_a_student_keeps_all_of_its_task_but_the_network(spec: TaskSpec) -> None:
    task = load_task(spec)
    student = task.student("linear")
    assert (student.input, student.output, student.labels) == (task.input, task.output, task.labels)
    assert student.contract == task.contract
    assert len(start_of(student)) < len(start_of(task))


def test_every_network_for_pictures_may_be_a_student() -> None:
    task = ImageClassification.from_options(
        {"model": "wide-cnn", "height": 28, "width": 28, "labels": ["a", "b"]}
    )
    assert len(start_of(task.student("small-cnn-half"))) < len(start_of(task.student("small-cnn")))


@pytest.mark.parametrize("spec", [STATES, LINE])
def test_a_student_that_a_task_does_not_offer_is_refused(spec: TaskSpec) -> None:
    with pytest.raises(ConfigError, match="giant"):
        load_task(spec).student("giant")


def test_the_loss_is_that_of_hinton_et_al() -> None:
    task = load_task(STATES)
    rng = torch.Generator().manual_seed(0)
    outputs, taught = (torch.randn(5, 3, generator=rng) for _ in range(2))
    targets = torch.tensor([0, 1, 2, 0, 1])
    found = task.distil_loss(outputs, taught, targets, temperature=3.0, weight=0.7)
    p, q = torch.softmax(taught / 3, 1), torch.softmax(outputs / 3, 1)
    soft = (p * (p.log() - q.log())).sum(dim=1).mean() * 9
    assert float(found) == pytest.approx(float(0.7 * soft + 0.3 * task.loss(outputs, targets)))


def test_without_labels_a_student_follows_its_teachers_numbers() -> None:
    task = load_task(LINE)
    outputs, taught = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [1.0]])
    targets = torch.tensor([1.0, 2.0])
    found = task.distil_loss(outputs, taught, targets, temperature=3.0, weight=1.0)
    assert float(found) == pytest.approx((0.25 + 1.0) / 2)


def test_a_teacher_without_a_word_changes_nothing() -> None:
    student = load_task(STATES).student("linear")
    alone = train(student, start_of(student), rows(), PLAN, seed=2)
    beside = train(student, start_of(student), rows(), PLAN, seed=2, teacher=trained_teacher(0.0))
    np.testing.assert_allclose(beside.parameters, alone.parameters, atol=1e-6)


def test_a_student_learns_from_its_teacher_what_wrong_labels_do_not_say() -> None:
    """Its device has lost every label: only the teacher knows."""
    student, teacher = load_task(STATES).student("mlp"), trained_teacher(1.0)
    lost = Examples(rows().inputs, np.zeros(len(rows()), np.int64))
    update = train(student, start_of(student), lost, PLAN, seed=2, teacher=teacher)
    task = load_task(STATES)
    taught = task.summarize(evaluate(task, teacher.parameters, rows()))["accuracy"]
    assert taught > 0.95
    assert student.summarize(evaluate(student, update.parameters, rows()))["accuracy"] > 0.9


def test_a_teacher_of_another_network_is_refused() -> None:
    task = load_task(STATES)
    odd = Teacher(task, np.zeros(3, np.float32), 4.0, 0.5)
    with pytest.raises(PeerError, match="do not fit a model"):
        train(task, start_of(task), rows(), PLAN, seed=2, teacher=odd)


def test_a_question_is_about_its_student_and_teacher_too() -> None:
    small, large = StudentPlan(network="linear"), StudentPlan(network="mlp")
    digests = {
        question(*arguments)
        for question, *arguments in (
            (training_question, b"{}"),
            (training_question, b"{}", encode_student(small)),
            (training_question, b"{}", encode_student(large)),
            (evaluation_question,),
            (evaluation_question, encode_student(small)),
        )
    }
    assert len(digests) == 5


# --- the ClientApp -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower's processes know of themselves
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    lines = [f"{x[0]},{STATES.options['labels'][y]}" for x, y in zip(*vars_of(rows()), strict=True)]
    (tmp_path / "states.csv").write_text("\n".join(["x,state", *lines]) + "\n")
    now = datetime(2026, 11, 1, tzinfo=UTC)
    DataRegistry(tmp_path).add(check_data("mine", tmp_path / "states.csv", STATES, now=now))
    enrol_homes({"edge-1": tmp_path}, policy=ALL_MAY_LEAVE)
    return tmp_path


def vars_of(examples: Examples) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...]:
    return examples.inputs, examples.targets


def context_of(home: Path) -> Context:
    return Context(
        run_id=1,
        node_id=2,
        node_config={"home": str(home), "data": "mine"},
        state=RecordDict(),
        run_config={"task": msgspec.json.encode(STATES).decode()},
    )


def message(student: str, *, teacher: Vector | None = None, kind: str = "train") -> Message:
    start = start_of(load_task(STATES).student("linear"))
    content = RecordDict(
        {"parameters": ArrayRecord([start]), "student": ConfigRecord({"json": student})}
    )
    if kind == "train":
        text = msgspec.json.encode(PLAN).decode()
        content["plan"] = ConfigRecord({"json": text, "round": 1, "seed": 7, "min_examples": 1})
    if teacher is not None:
        content["teacher"] = ArrayRecord([teacher])
    return Message(content, 2, kind)


def taught_by(teacher: Vector) -> str:
    distil = Distillation(
        teacher=base_digest_of(teacher), parameters_sha256="0" * 64, temperature=4.0, weight=0.8
    )
    return encode_student(StudentPlan(network="linear", distil=distil)).decode()


def test_a_train_message_about_a_student_is_answered_with_what_it_learns(home: Path) -> None:
    teacher = trained_teacher(0.8)
    asked = message(taught_by(teacher.parameters), teacher=teacher.parameters)
    reply = app(asked, context_of(home))

    assert reply.has_content(), reply.error
    data = load_from_home(context_of(home))
    student = data.task.student("linear")
    update = train(
        student,
        start_of(student),
        data.train,
        PLAN,
        seed=device_seed(7, 1, data.digest),
        teacher=teacher,
    )
    (found,) = reply.content.array_records["parameters"].to_numpy_ndarrays()
    np.testing.assert_array_equal(found, update.parameters)


def test_a_student_is_measured_by_its_own_network(home: Path) -> None:
    reply = app(message('{"network":"linear"}', kind="evaluate"), context_of(home))
    data = load_from_home(context_of(home))
    student = data.task.student("linear")
    expected = evaluate(student, start_of(student), data.held_out)
    assert dict(reply.content.metric_records["metrics"]) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ("{}", None, "the student in the message does not fit"),
        ('{"network":"giant"}', None, "giant"),
        ('{"network":"mlp"}', None, "has 4,483 parameters, more than the 355 of the task's own"),
        ('{"network":"../etc"}', None, "the student in the message does not fit"),
        (taught_by(np.ones(4, np.float32)), None, "holds no single vector of teacher"),
        (
            taught_by(np.ones(4, np.float32)),
            np.zeros(4, np.float32),
            "not the one of this question",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    home: Path, student: str, teacher: Vector | None, words: str
) -> None:
    assert words in str(app(message(student, teacher=teacher), context_of(home)).error.reason)
