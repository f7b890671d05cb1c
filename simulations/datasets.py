"""Real data sets that are on this machine, for the demo and experiments. Nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import DataError
from shared.tasks.contract import DataContract, ImageShape
from shared.tasks.examples import Examples
from shared.tasks.sources import read_source
from shared.tasks.spec import TaskSpec

FASHION_MNIST_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),  # Debian's package dataset-fashion-mnist
    Path(".data/usr/share/datasets/fashion-mnist"),  # the same, unpacked by the Makefile
)
_FASHION_LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
_DIGITS_TRAIN_ROWS = 1500


@dataclass(frozen=True, slots=True)
class ImageDataset:
    """Grey images with labels, split once and for all into training and test rows."""

    title: str
    labels: tuple[str, ...]
    train: Examples  # inputs uint8 (n, 1, height, width), targets int64 (n,)
    test: Examples

    def task(self, *, name: str, model: str) -> TaskSpec:
        """Describe the classification task of this data set."""
        _, channels, height, width = self.train.inputs.shape
        options = {
            "model": model,
            "height": height,
            "width": width,
            "channels": channels,
            "labels": list(self.labels),
            "loss": "balanced",  # for devices that hold few classes each; see docs/tasks.md
        }
        return TaskSpec(name=name, uses="image-classification", options=options)


def load_images(folder: Path | None) -> ImageDataset:
    """Load Fashion-MNIST from ``folder`` or where it is usually found, else real digits.

    Raises:
        DataError: ``folder`` was given and holds no Fashion-MNIST.
    """
    if folder is not None:
        return _load_fashion_mnist(folder)
    for candidate in FASHION_MNIST_FOLDERS:
        if candidate.is_dir():
            return _load_fashion_mnist(candidate)
    return load_digits_images()


def _load_fashion_mnist(folder: Path) -> ImageDataset:
    contract = DataContract(sources=("idx",), image=ImageShape(28, 28), labels=_FASHION_LABELS)
    parts = [
        read_source(_idx_images(folder, part), contract).examples for part in ("train", "t10k")
    ]
    return ImageDataset("Fashion-MNIST", _FASHION_LABELS, *parts)


def _idx_images(folder: Path, part: str) -> Path:
    found = sorted(folder.glob(f"{part}-images-idx3-ubyte*"))
    if not found:
        raise DataError(
            f"{folder} holds no {part}-images-idx3-ubyte(.gz); name the folder with "
            "Fashion-MNIST's four files, or leave --data out"
        )
    return found[0]


def load_digits_images() -> ImageDataset:
    """Load scikit-learn's 1,797 real scanned digits (UCI), 8 x 8 pixels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 (slow, and only without Fashion-MNIST)

    digits = load_digits()
    images = np.minimum(digits.images * 16, 255).astype(np.uint8)[:, np.newaxis]
    rows = np.random.default_rng(0).permutation(len(images))
    examples = Examples(images[rows], digits.target[rows].astype(np.int64))
    train, test = (
        examples.take(np.arange(start, stop))
        for start, stop in ((0, _DIGITS_TRAIN_ROWS), (_DIGITS_TRAIN_ROWS, len(images)))
    )
    title = "scikit-learn's digits (Fashion-MNIST is not on this machine)"
    return ImageDataset(title, tuple(str(digit) for digit in range(10)), train, test)
