"""The demo's data: Fashion-MNIST where it is, else real digits, and the title says which."""

from pathlib import Path

import numpy as np
import pytest

from shared.errors import DataError
from simulations import datasets
from simulations.datasets import load_images
from simulations.partition import dirichlet_partition
from tests.system_packages import require_fashion_mnist


def test_where_fashion_mnist_is_missing_real_digits_are_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDERS", (tmp_path / "nowhere",))

    images = load_images(None)

    assert images.title == "scikit-learn's digits (Fashion-MNIST is not on this machine)"
    assert images.train.inputs.shape == (1500, 1, 8, 8)
    assert images.test.inputs.shape == (297, 1, 8, 8)


def test_fashion_mnist_is_taken_where_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = require_fashion_mnist()
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDERS", (Path("nowhere"), folder))

    images = load_images(None)

    assert images.title == "Fashion-MNIST"
    assert (len(images.train), len(images.test)) == (60_000, 10_000)
    assert images.task(name="fashion", model="lenet5").options["labels"] == list(images.labels)


def test_a_folder_that_was_named_must_hold_fashion_mnist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the folder with Fashion-MNIST's four files"):
        load_images(tmp_path)


def test_a_partition_deals_each_row_once_and_skews_the_classes() -> None:
    labels = np.repeat(np.arange(10), 100)

    parts = dirichlet_partition(labels, devices=5, alpha=0.3, rng=np.random.default_rng(7))
    again = dirichlet_partition(labels, devices=5, alpha=0.3, rng=np.random.default_rng(7))

    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert all(np.array_equal(part, same) for part, same in zip(parts, again, strict=True))
    largest = [np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]
    assert min(largest) > 2 * 0.1  # an even deal gives each class a tenth


def test_too_many_devices_for_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="draw gave each of 50 devices 20 rows"):
        dirichlet_partition(
            np.zeros(900, np.int64), devices=50, alpha=0.3, rng=np.random.default_rng(0)
        )
