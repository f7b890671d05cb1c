"""The data contract of a task: which rows it can learn from, said without any data at hand."""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.errors import ConfigError

SourceKind = Literal["csv", "images", "idx", "npz"]


class Feature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One numeric column and the range its values must lie in."""

    name: str
    minimum: float = float("-inf")
    maximum: float = float("inf")


class ImageShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pixels of one image; files of another size are refused, not scaled."""

    height: Annotated[int, Meta(ge=1, le=4096)]
    width: Annotated[int, Meta(ge=1, le=4096)]
    channels: Literal[1, 3] = 1


class DataContract(msgspec.Struct, frozen=True, kw_only=True):
    """What a source must offer. Exactly one of ``features`` and ``image`` is set."""

    sources: tuple[SourceKind, ...]
    features: tuple[Feature, ...] = ()
    image: ImageShape | None = None
    target: str = "label"  # the CSV column to predict
    labels: tuple[str, ...] = ()  # the classes; empty: the target is a number
    target_minimum: float = float("-inf")
    target_maximum: float = float("inf")
    max_bad_fraction: float = 0.1  # a source with more broken rows is refused

    @property
    def feature_names(self) -> Sequence[str]:
        """Names of the numeric columns, in the order of the input vector."""
        return [feature.name for feature in self.features]


def check_labels(labels: tuple[str, ...]) -> None:
    """Raise ConfigError where two labels are the same or one is blank."""
    if len(set(labels)) != len(labels):
        raise ConfigError("labels: some are named twice; each class needs a label of its own")
    if any(label != label.strip() or not label for label in labels):
        raise ConfigError("labels: some are empty or have spaces around them; remove those")
