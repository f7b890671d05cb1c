from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from edge_agent.training import DivergedError, evaluate, train
from shared.errors import ConfigError, PeerError, StoppedError
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.tasks.examples import Examples, split_held_out
from shared.tasks.image_classification import ImageClassification
from shared.tasks.tabular import Tabular
from shared.tasks.task import Task, seeded_model
from shared.tasks.vectors import load_vector, to_vector


@pytest.fixture(scope="module")
def digits() -> Examples:
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Examples(images[:, np.newaxis], bunch.target.astype(np.int64))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits_task(**options: Any) -> ImageClassification:
    labels = [str(digit) for digit in range(10)]
    return ImageClassification.from_options({"height": 8, "width": 8, "labels": labels, **options})


def start_of(task: Task) -> Vector:
    return to_vector(seeded_model(task, 0))


def line_examples(count: int) -> Examples:
    x = np.linspace(-1, 1, count, dtype=np.float32)[:, np.newaxis]
    return Examples(x, 3 * x[:, 0] + 1)


def line_task(**options: Any) -> Tabular:
    return Tabular.from_options(
        {
            "kind": "regression",
            "features": [{"name": "x", "minimum": -1, "maximum": 1}],
            "target": "y",
            "target_minimum": -5,
            "target_maximum": 5,
            **options,
        }
    )


def test_a_device_learns_digits_that_it_never_saw(digits: Examples) -> None:
    task = digits_task()
    train_part, held_out = split_held_out(digits)

    update = train(task, start_of(task), train_part, TrainingPlan(epochs=10), seed=1)

    assert task.summarize(evaluate(task, update.parameters, held_out))["accuracy"] > 0.95
    assert update.num_examples == len(train_part)
    assert update.sums["seen"] == 10 * len(train_part)
    assert update.sums["loss_sum"] / update.sums["seen"] < 0.5


def test_five_unlike_devices_learn_digits_together(digits: Examples) -> None:
    task = digits_task(loss="balanced")
    train_part, held_out = split_held_out(digits)
    # Each device has four of the ten digits.
    devices = [
        train_part.take(np.isin(train_part.targets, [(2 * k + i) % 10 for i in range(4)]))
        for k in range(5)
    ]
    parameters = start_of(task)
    for round_number in range(8):
        updates = [
            train(task, parameters, data, TrainingPlan(max_batches=20), seed=round_number)
            for data in devices
        ]
        parameters = np.mean([update.parameters for update in updates], axis=0)

    assert task.summarize(evaluate(task, parameters, held_out))["accuracy"] > 0.9


@pytest.mark.parametrize(("model", "r2"), [("linear", 0.999), ("mlp", 0.99)])
def test_a_line_is_found(model: str, r2: float) -> None:
    task = line_task(model=model)
    examples = line_examples(200)

    update = train(task, start_of(task), examples, TrainingPlan(epochs=20), seed=0)

    assert task.summarize(evaluate(task, update.parameters, examples))["r2"] > r2


def test_the_same_seed_gives_the_same_update_whatever_happened_before(digits: Examples) -> None:
    task, plan = digits_task(), TrainingPlan(max_batches=3)
    start, some = start_of(task), digits.take(np.arange(200))

    first = train(task, start, some, plan, seed=5)
    torch.manual_seed(123)
    generator_state = torch.random.get_rng_state()
    again = train(task, start, some, plan, seed=5)
    other = train(task, start, some, plan, seed=6)

    np.testing.assert_array_equal(first.parameters, again.parameters)
    assert not np.array_equal(first.parameters, other.parameters)
    assert torch.equal(torch.random.get_rng_state(), generator_state)


@settings(max_examples=20, deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    rows=st.integers(1, 70),
)
def test_the_steps_are_those_of_torch_s_own_sgd(
    momentum: float, weight_decay: float, rows: int
) -> None:
    task, examples = line_task(model="mlp", hidden=4), line_examples(rows)
    plan = TrainingPlan(
        epochs=3, batch_size=16, momentum=momentum, weight_decay=weight_decay, learning_rate=0.1
    )

    ours = train(task, start_of(task), examples, plan, seed=2).parameters

    model = seeded_model(task, 0)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay
    )
    rng = np.random.default_rng(2)
    for _ in range(3):
        order = rng.permutation(rows)
        for start in range(0, rows, 16):
            batch = examples.take(order[start : start + 16])
            optimizer.zero_grad()
            outputs = model(torch.from_numpy(batch.inputs))
            task.loss(outputs, torch.from_numpy(batch.targets)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    np.testing.assert_allclose(ours, to_vector(model), rtol=1e-5, atol=1e-7)


def test_max_batches_bounds_an_epoch(digits: Examples) -> None:
    task = digits_task()
    plan = TrainingPlan(epochs=2, max_batches=3, batch_size=10)

    update = train(task, start_of(task), digits, plan, seed=0)

    assert update.sums["seen"] == 60
    assert update.num_examples == len(digits)


def test_training_stops_between_batches_when_asked(digits: Examples) -> None:
    task = digits_task()
    answers = iter([False, False, True])

    with pytest.raises(StoppedError, match=r"^training was stopped$"):
        train(
            task,
            start_of(task),
            digits,
            TrainingPlan(),
            seed=0,
            should_stop=lambda: next(answers),
        )


def test_diverged_training_says_which_setting_to_lower() -> None:
    task, plan = line_task(), TrainingPlan(epochs=100, learning_rate=50)

    with pytest.raises(
        ConfigError,
        match=r"^training diverged; lower training.learning_rate \(now 50\)$",
    ):
        train(task, start_of(task), line_examples(100), plan, seed=0)


def test_divergence_in_the_very_last_step_is_no_update() -> None:
    # The only loss is finite here, and its gradient is not.
    task = line_task(features=[{"name": "x", "mean": 0.0, "scale": 1e-25}])
    start = np.array([1e-7, 0], np.float32)

    with pytest.raises(ConfigError, match="training diverged"):
        train(task, start, line_examples(4), TrainingPlan(), seed=0)


def test_training_that_diverges_takes_as_long_as_any() -> None:
    task, plan = line_task(), TrainingPlan(epochs=100, learning_rate=50)
    batches = 0

    def go_on() -> bool:
        nonlocal batches
        batches += 1
        return False

    with pytest.raises(DivergedError):
        train(
            task,
            start_of(task),
            line_examples(100),
            plan,
            seed=0,
            should_stop=go_on,
        )

    assert batches == 100 * 4  # every batch of every epoch


@pytest.mark.parametrize("shape", [(3,), (0,), (13_962, 1)])
def test_parameters_of_another_network_are_refused(
    digits: Examples, shape: tuple[int, ...]
) -> None:
    with pytest.raises(PeerError, match="do not fit a model of 13962 parameters"):
        train(digits_task(), np.zeros(shape, np.float32), digits, TrainingPlan(), seed=0)
    with pytest.raises(PeerError, match="do not fit a model of 13962 parameters"):
        evaluate(digits_task(), np.zeros(shape, np.float32), digits)


def test_statistics_of_parts_add_up_to_those_of_the_whole(digits: Examples) -> None:
    task = digits_task()
    start = start_of(task)

    whole = evaluate(task, start, digits)
    parts = [evaluate(task, start, digits.take(np.arange(i, len(digits), 3))) for i in range(3)]

    added = {name: sum(part[name] for part in parts) for name in whole}
    assert added == pytest.approx(whole, rel=1e-5)
    assert whole["examples"] == len(digits)


def test_measuring_nothing_adds_nothing(digits: Examples) -> None:
    task = digits_task()

    assert evaluate(task, start_of(task), digits.take(np.arange(0))) == {"examples": 0}


def test_training_on_nothing_is_a_mistake(digits: Examples) -> None:
    task = digits_task()

    with pytest.raises(ValueError, match="nothing to train on"):
        train(task, start_of(task), digits.take(np.arange(0)), TrainingPlan(), seed=0)


class DropoutAndNorm(ImageClassification):
    """A network whose randomness and running statistics must travel or repeat."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10), nn.LogSoftmax(1)
        )


def test_dropout_repeats_and_running_statistics_travel(digits: Examples) -> None:
    labels = [str(digit) for digit in range(10)]
    task = DropoutAndNorm.from_options({"height": 8, "width": 8, "labels": labels})
    start, plan = start_of(task), TrainingPlan(learning_rate=0.01)

    first = train(task, start, digits, plan, seed=4)
    again = train(task, start, digits, plan, seed=4)

    np.testing.assert_array_equal(first.parameters, again.parameters)
    model = task.build_model()
    load_vector(model, first.parameters)
    mean = model.state_dict()["0.running_mean"].item()
    assert mean == pytest.approx(digits.inputs.mean(), rel=0.1)


def test_training_leaves_torch_s_compiler_alone() -> None:
    import subprocess
    import sys

    program = (
        "import sys, numpy as np\n"
        "from edge_agent.training import train\n"
        "from shared.run_plan import TrainingPlan\n"
        "from shared.tasks.examples import Examples\n"
        "from shared.tasks.image_classification import ImageClassification as T\n"
        "from shared.tasks.task import seeded_model\n"
        "from shared.tasks.vectors import to_vector\n"
        "task = T.from_options({'height': 8, 'width': 8, 'labels': ['a', 'b']})\n"
        "rows = Examples(np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64))\n"
        "train(task, to_vector(seeded_model(task, 0)), rows, TrainingPlan(), seed=0)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.strip() == "False"
