"""Reads a NumPy archive: arrays ``inputs`` and ``targets``, or ``images`` and ``labels``."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DataError
from shared.tasks.contract import DataContract, ImageShape
from shared.tasks.examples import Examples
from shared.tasks.intake import SkippedRows, not_a_label

_Check = tuple[str, NDArray[np.bool_]]
_REAL = "iuf"  # the kinds of dtype that are whole or real numbers
_LARGEST = float(np.finfo(np.float32).max)


def read_npz(path: Path, contract: DataContract, skipped: SkippedRows) -> Examples:
    """Read the rows that fit.

    Images are uint8, shape (n, height, width) or with channels last or second; features are
    numbers, shape (n, features) in the contract's order. Labels are class indices or names.

    Raises:
        DataError: not such an archive, or arrays whose shape or type does not fit the contract.
    """
    inputs, targets = _load(path)
    if len(inputs) != len(targets):
        raise DataError(
            f"{path} holds {len(inputs)} inputs but {len(targets)} targets; store as many of both"
        )
    if contract.image:
        inputs, input_checks = _as_images(path, inputs, contract.image), list[_Check]()
    else:
        input_checks = list(_feature_checks(path, inputs, contract))
    targets, target_checks = _as_targets(path, targets, contract)
    kept = skipped.keep([*input_checks, *target_checks], unit="row")
    kind = np.uint8 if contract.image else np.float32
    return Examples(
        inputs[kept].astype(kind, copy=False),
        targets[kept].astype(np.int64 if contract.labels else np.float32),
    )


def _load(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            for first, second in (("inputs", "targets"), ("images", "labels")):
                if first in archive and second in archive:
                    return np.atleast_1d(archive[first]), np.atleast_1d(archive[second])
            found = ", ".join(archive.files) or "none"
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not an NPZ archive of plain arrays; store it with numpy.savez"
        ) from error
    raise DataError(
        f"{path} holds the arrays {found}; name them inputs and targets, or images and labels"
    )


def _as_images(path: Path, inputs: NDArray[Any], shape: ImageShape) -> NDArray[Any]:
    """Return the images as (n, channels, height, width)."""
    height, width, channels = shape.height, shape.width, shape.channels
    if inputs.dtype == np.uint8:
        if inputs.shape[1:] == (channels, height, width):
            return inputs
        if inputs.shape[1:] == (height, width, channels):
            return inputs.transpose(0, 3, 1, 2)
        if channels == 1 and inputs.shape[1:] == (height, width):
            return inputs[:, np.newaxis]
    raise DataError(
        f"{path} holds images of type {inputs.dtype} and shape {inputs.shape[1:]} where the "
        f"contract wants uint8 of {height} x {width} x {channels}; convert them or correct the "
        "task's options"
    )


def _feature_checks(path: Path, inputs: NDArray[Any], contract: DataContract) -> Iterator[_Check]:
    wanted = len(contract.features)
    if inputs.shape[1:] != (wanted,) or inputs.dtype.kind not in _REAL:
        raise DataError(
            f"{path} holds inputs of type {inputs.dtype} and shape {inputs.shape[1:]} where the "
            f"contract has {wanted} numeric features; store one column for each"
        )
    for feature, column in zip(contract.features, inputs.T, strict=True):
        yield from _range_checks(
            f"feature {feature.name!r}", column, feature.minimum, feature.maximum
        )


def _range_checks(
    name: str, column: NDArray[Any], minimum: float, maximum: float
) -> Iterator[_Check]:
    missing = np.isnan(column)
    yield f"{name} is missing", missing
    in_range = (column >= max(minimum, -_LARGEST)) & (column <= min(maximum, _LARGEST))
    yield f"{name} is out of range", ~in_range & ~missing


def _as_targets(
    path: Path, targets: NDArray[Any], contract: DataContract
) -> tuple[NDArray[Any], list[_Check]]:
    """Return targets as numbers, and what is wrong with which."""
    if targets.ndim == 1 and not contract.labels and targets.dtype.kind in _REAL:
        low, high = contract.target_minimum, contract.target_maximum
        return targets, list(_range_checks(f"target {contract.target!r}", targets, low, high))
    if targets.ndim == 1 and contract.labels and np.issubdtype(targets.dtype, np.integer):
        strange = (targets < 0) | (targets >= len(contract.labels))
        return targets, [(not_a_label(contract.labels), strange)]
    if targets.ndim == 1 and contract.labels and np.issubdtype(targets.dtype, np.str_):
        index_of = {label: index for index, label in enumerate(contract.labels)}
        indices = np.array([index_of.get(str(name), -1) for name in targets], np.int64)
        return indices, [(not_a_label(contract.labels), indices < 0)]
    wanted = "class indices or names" if contract.labels else "numbers"
    raise DataError(
        f"{path} holds targets of type {targets.dtype} and shape {targets.shape} where the "
        f"contract wants {wanted}, one for each row; convert them"
    )
