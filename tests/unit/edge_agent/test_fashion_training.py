"""The stated accuracy of the built-in small CNN, on the data and by the rounds of the demo."""

import numpy as np
import pytest
import torch

from edge_agent.training import evaluate, train
from edge_agent.training_app import device_seed
from shared.run_plan import TrainingPlan
from shared.tasks.examples import split_held_out
from shared.tasks.image_classification import ImageClassification
from shared.tasks.sources import read_source
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector
from simulations.partition import dirichlet_partition
from tests.system_packages import require_fashion_mnist

SEED = 7
PLAN = TrainingPlan(max_batches=40, batch_size=32, learning_rate=0.05, momentum=0.9)


@pytest.mark.slow
def test_ten_rounds_of_five_skewed_devices_reach_84_percent_on_fashion_mnist() -> None:
    folder = require_fashion_mnist()
    task = ImageClassification.from_options(
        {"height": 28, "width": 28, "labels": list("abcdefghij"), "loss": "balanced"}
    )
    data, test = (
        read_source(folder / f"{name}-images-idx3-ubyte.gz", task.contract).examples
        for name in ("train", "t10k")
    )
    rng = np.random.default_rng(SEED)
    parts = dirichlet_partition(data.targets, devices=5, alpha=0.3, rng=rng)
    devices = [split_held_out(data.take(rows))[0] for rows in parts]
    torch.set_num_threads(1)

    parameters = to_vector(seeded_model(task, SEED))
    weights = [len(device) for device in devices]
    for number in range(1, 11):
        updates = [
            train(task, parameters, rows, PLAN, seed=device_seed(SEED, number, rows.digest()))
            for rows in devices
        ]
        mean = np.average([update.parameters for update in updates], axis=0, weights=weights)
        parameters = mean.astype(np.float32)

    # 85.8 to 86.1 % where it was measured; another processor's rounding moves it by half a point.
    assert task.summarize(evaluate(task, parameters, test))["accuracy"] >= 0.84
