import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import ConfigError
from shared.tasks.contract import ImageShape
from shared.tasks.image_classification import ImageClassification
from shared.tasks.task import seeded_model

LABELS = [f"class {index}" for index in range(10)]


def task_for(model: str, side: int, channels: int = 1, **options: object) -> ImageClassification:
    return ImageClassification.from_options(
        {
            "model": model,
            "height": side,
            "width": side,
            "channels": channels,
            "labels": LABELS,
            **options,
        }
    )


@pytest.mark.parametrize(
    ("model", "side", "channels", "parameters"),
    [
        ("small-cnn", 28, 1, 106_122),
        ("small-cnn", 8, 1, 13_962),
        ("small-cnn", 32, 3, 137_642),
        ("small-cnn", 224, 3, 299_626),
        ("small-cnn", 5, 1, 13_962),
        ("small-cnn-half", 28, 1, 26_826),
        ("lenet-5", 28, 1, 61_706),
        ("lenet-5", 32, 3, 83_126),
        ("mid-cnn", 28, 1, 203114),
        ("wide-cnn", 28, 1, 2798922),
    ],
)
def test_networks_have_the_stated_shapes_and_sizes(
    model: str, side: int, channels: int, parameters: int
) -> None:
    task = task_for(model, side, channels)
    network = task.build_model()
    inputs = task.example_inputs(np.random.default_rng(0), 3)

    assert network(torch.from_numpy(inputs)).shape == (3, 10)
    assert inputs.shape[1:] == task.input.shape[1:]
    assert inputs.dtype == np.float32
    assert task.output.shape == (-1, 10)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_pictures_need_not_be_square() -> None:
    task = ImageClassification.from_options(
        {"height": 5, "width": 300, "channels": 3, "labels": ["a", "b"]}
    )

    assert task.build_model()(torch.zeros(2, 3, 5, 300)).shape == (2, 2)


def test_nothing_in_the_networks_keeps_statistics_of_a_device_s_data() -> None:
    for model in ("small-cnn", "small-cnn-half", "lenet-5", "mid-cnn", "wide-cnn"):
        network = task_for(model, 28).build_model()
        assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]


def test_raw_pixels_are_scaled_inside_the_network() -> None:
    seen: list[torch.Tensor] = []
    network = task_for("small-cnn", 28).build_model()
    convolution = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    network(torch.tensor([0.0, 255.0]).reshape(2, 1, 1, 1).expand(2, 1, 28, 28))

    assert set(seen[0].flatten().tolist()) == {0.0, 1.0}


def test_the_initial_weights_depend_on_the_seed_alone() -> None:
    task = task_for("small-cnn", 28)
    first, again, other = (seeded_model(task, seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_contract_wants_pictures_of_exactly_this_size_and_labels() -> None:
    contract = task_for("small-cnn", 28, 3).contract

    assert contract.image == ImageShape(28, 28, 3)
    assert contract.labels == tuple(LABELS)
    assert set(contract.sources) == {"images", "idx", "npz"}


def test_the_balanced_loss_spares_classes_that_a_batch_lacks() -> None:
    targets = torch.tensor([0, 0, 1])
    gradients = {}
    for loss in ("cross-entropy", "balanced"):
        logits = torch.zeros(3, 10, requires_grad=True)
        task_for("small-cnn", 28, loss=loss).loss(logits, targets).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        gradients[loss] = logits.grad[:, 2:].sum().item()

    assert gradients["balanced"] < gradients["cross-entropy"] / 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"labels": ["a", "b", "a"]}, "labels: some are named twice"),
        ({"labels": ["a", " b"]}, "labels: some are empty or have spaces around them"),
        ({"labels": ["a"]}, "labels: expected `array` of length >= 2"),
        ({"model": "resnet"}, "model: there is no 'resnet'; choose one of 'lenet-5', 'mid-cnn', "),
        ({"channels": 2}, "channels: there is no 2; choose one of 1, 3"),
        ({"model": "lenet-5", "height": 8}, "lenet-5 takes pictures of 12 to 64 pixels a side"),
        ({"model": "wide-cnn", "height": 65}, "wide-cnn takes pictures of 4 to 64 pixels a side"),
        ({"height": 0}, "height: expected `int` >= 4"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], sentence: str) -> None:
    good = {"model": "small-cnn", "height": 28, "width": 28, "labels": LABELS}

    with pytest.raises(ConfigError, match=sentence):
        ImageClassification.from_options(good | options)
