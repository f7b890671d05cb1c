"""The built-in task `image-classification`: small networks for small pictures.

In a task file::

    name = "fashion"
    uses = "image-classification"
    [options]
    model = "small-cnn"        # or "small-cnn-half", "lenet-5", "mid-cnn", "wide-cnn"
    height = 28
    width = 28
    channels = 1               # 1 grey, 3 colours
    labels = ["shirt", "shoe"] # in the order of the class indices
    loss = "cross-entropy"     # or "balanced", where devices have few of the classes each

The served network takes raw pixels: float32 of shape (batch, channels, height, width), each in
[0, 255]; scaling is its first layer. No network has normalisation layers whose running statistics
would differ from device to device. Each may be another one's student.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.config import convert
from shared.errors import ConfigError
from shared.manifest import TensorSpec
from shared.tasks.contract import DataContract, ImageShape, check_labels
from shared.tasks.losses import ClassificationLoss, classification_loss
from shared.tasks.metrics import classification_bounds, classification_summary, classification_sums
from shared.tasks.task import Task

_SMALL_CNN_CHANNELS = (16, 32, 64)  # of the stages; further ones repeat the last
_SMALL_CNN_SIDE = 8  # stages halve the picture until it is no larger than this


Model = Literal["small-cnn", "small-cnn-half", "lenet-5", "mid-cnn", "wide-cnn"]
# Of pictures, for networks that flatten whatever their two halvings leave.
_SIDES: Mapping[Model, range] = {
    "lenet-5": range(12, 65),
    "mid-cnn": range(4, 65),
    "wide-cnn": range(4, 65),
}


class ImageOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a person writes under ``[options]``."""

    model: Model = "small-cnn"
    height: Annotated[int, Meta(ge=4, le=4096)]
    width: Annotated[int, Meta(ge=4, le=4096)]
    channels: Literal[1, 3] = 1
    labels: Annotated[tuple[str, ...], Meta(min_length=2, max_length=10_000)]
    loss: ClassificationLoss = "cross-entropy"

    def __post_init__(self) -> None:
        check_labels(self.labels)
        sides = _SIDES.get(self.model)
        if sides is not None and not {self.height, self.width} <= set(sides):
            raise ConfigError(
                f"{self.model} takes pictures of {sides[0]} to {sides[-1]} pixels a side, "
                f"not {self.height} x {self.width}; use small-cnn"
            )


class PixelScaling(nn.Module):
    """Maps raw pixels in [0, 255] to [0, 1]: a black background stays nothing at all."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Scale a batch of any shape."""
        return pixels * (1 / 255)


class ImageClassification(Task):
    """Says which of its labels a picture shows."""

    primary_metric = "accuracy"

    def __init__(self, options: ImageOptions) -> None:
        self._options = options
        self._shape = (options.channels, options.height, options.width)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build the task from the fields of `ImageOptions`."""
        return cls(convert(dict(options), ImageOptions, source="options of image-classification"))

    @property
    def contract(self) -> DataContract:
        """Pictures of exactly one size, with a label each."""
        o = self._options
        return DataContract(
            sources=("images", "idx", "npz"),
            image=ImageShape(o.height, o.width, o.channels),
            labels=o.labels,
        )

    @property
    def input(self) -> TensorSpec:
        """Raw pixels in [0, 255]."""
        return TensorSpec("pixels", "FP32", (-1, *self._shape))

    @property
    def output(self) -> TensorSpec:
        """One score for each label; their softmax is the probability."""
        return TensorSpec("logits", "FP32", (-1, len(self.labels)))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by index."""
        return self._options.labels

    def build_model(self) -> nn.Module:
        """Return the network from raw pixels to logits."""
        layers = _NETWORKS[self._options.model](*self._shape, classes=len(self.labels))
        for layer in layers:
            _initialise(layer)
        return nn.Sequential(PixelScaling(), *layers)

    def student(self, name: str) -> "ImageClassification":
        """Return the same task with another of the networks above."""
        options = {**msgspec.structs.asdict(self._options), "model": name}
        source = f"the student {name!r} of image-classification"
        return ImageClassification(convert(options, ImageOptions, source=source))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats; see `classification_loss`."""
        return classification_loss(self._options.loss, outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Count examples and hits, and sum the loss."""
        return classification_sums(outputs, targets)

    @property
    def statistics(self) -> Mapping[str, float]:
        """What `measure` returns, and how much of it one example may be."""
        return classification_bounds()

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return ``loss`` and ``accuracy``."""
        return classification_summary(sums)

    def example_inputs(self, rng: np.random.Generator, rows: int) -> NDArray[Any]:
        """Draw pictures of noise, shape (rows, channels, height, width)."""
        return rng.integers(0, 256, (rows, *self._shape)).astype(np.float32)


def _initialise(layer: nn.Module) -> None:
    """Draw weights after He et al. 2015: the first rounds of a fleet are worth more than luck."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def _lenet_5(channels: int, height: int, width: int, *, classes: int) -> list[nn.Module]:
    """LeCun et al. 1998, with ReLU and maximum pooling as it is built today."""
    flat = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
    return [
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    ]


def _mid_cnn(channels: int, height: int, width: int, *, classes: int) -> list[nn.Module]:
    """Three convolutions of 24 to 96 channels; 203 k parameters for 28 x 28 and ten classes."""
    return [
        nn.Conv2d(channels, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 96, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96 * (height // 4) * (width // 4), 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    ]


def _wide_cnn(channels: int, height: int, width: int, *, classes: int) -> list[nn.Module]:
    """Four convolutions of 32 to 256 channels; 2.8 M parameters for 28 x 28 and ten classes."""
    return [
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 256, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256 * (height // 4) * (width // 4), 192),
        nn.ReLU(),
        nn.Linear(192, classes),
    ]


def _small_cnn(
    channels: int, height: int, width: int, *, classes: int, width_share: float = 1.0
) -> list[nn.Module]:
    """Stages of convolution (5 x 5, then 3 x 3) and halving, two at least; one hidden layer.

    ``width_share`` of the channels and of the hidden units are there.
    """
    layers: list[nn.Module] = []
    kernel, hidden = 5, int(64 * width_share)
    stages = [int(width_share * stage) for stage in _stage_channels(max(height, width))]
    for before, after in pairwise((channels, *stages)):
        steps = tuple(2 if side >= 4 else 1 for side in (height, width))
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2)
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(steps)]
        height, width = height // steps[0], width // steps[1]
        last, kernel = after, 3
    return [
        *layers,
        nn.Flatten(),
        nn.Linear(last * height * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    ]


def _stage_channels(side: int) -> list[int]:
    stages = 2
    while side >> stages > _SMALL_CNN_SIDE:
        stages += 1
    last = len(_SMALL_CNN_CHANNELS) - 1
    return [_SMALL_CNN_CHANNELS[min(stage, last)] for stage in range(stages)]


_NETWORKS: Mapping[Model, Callable[..., list[nn.Module]]] = {
    "small-cnn": _small_cnn,
    "small-cnn-half": partial(_small_cnn, width_share=0.5),
    "lenet-5": _lenet_5,
    "mid-cnn": _mid_cnn,
    "wide-cnn": _wide_cnn,
}
