"""Reads a folder of pictures: one sub-folder per label, PNG or JPEG files in it."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import DataError
from shared.tasks.contract import DataContract, ImageShape
from shared.tasks.examples import Examples
from shared.tasks.intake import SkippedRows

_SUFFIXES = (".png", ".jpg", ".jpeg")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class _BadImageError(Exception):
    """Carries the reason for which one file is skipped."""


def read_image_folder(path: Path, contract: DataContract, skipped: SkippedRows) -> Examples:
    """Read the pictures that fit; hidden files are ignored.

    Pillow turns colours into grey (ITU-R 601 luma) or grey into colours where the contract's
    channels ask for it, and drops transparency; nothing is scaled.

    Raises:
        DataError: no sub-folder has the name of a label.
    """
    shape = contract.image
    assert shape is not None
    files = _labelled_files(path, contract, skipped)
    inputs = np.empty((len(files), shape.channels, shape.height, shape.width), np.uint8)
    targets = np.empty(len(files), np.int64)
    used = 0
    for file, label in files:
        try:
            inputs[used] = _pixels(file, shape)
        except _BadImageError as bad:
            skipped.add(str(bad), str(file.relative_to(path)))
            continue
        targets[used] = label
        used += 1
    return Examples(inputs[:used], targets[:used])


def _labelled_files(
    path: Path, contract: DataContract, skipped: SkippedRows
) -> list[tuple[Path, int]]:
    """List the files of all labels, sorted by path, each with its label's index."""
    folders = sorted(entry for entry in _visible(path) if entry.is_dir())
    index_of = {label: index for index, label in enumerate(contract.labels)}
    if not any(folder.name in index_of for folder in folders):
        raise DataError(
            f"{path} has no sub-folder named like one of the labels "
            f"({', '.join(contract.labels)}); sort the pictures into such folders"
        )
    files: list[tuple[Path, int]] = []
    for folder in folders:
        inside = sorted(entry for entry in _visible(folder) if entry.is_file())
        if folder.name in index_of:
            files.extend((file, index_of[folder.name]) for file in inside)
        elif inside:
            skipped.add("folder is named like no label", folder.name, len(inside))
    return files


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _pixels(file: Path, shape: ImageShape) -> NDArray[Any]:
    """Return the picture as (channels, height, width), each pixel in [0, 255]."""
    if file.suffix.lower() not in _SUFFIXES:
        raise _BadImageError("file is neither PNG nor JPEG")
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.size != (shape.width, shape.height):  # known before anything is decoded
                raise _BadImageError(f"picture is not {shape.height} x {shape.width} pixels")
            if image.mode not in _EIGHT_BIT_MODES:
                raise _BadImageError("picture has more than 8 bits per channel")
            pixels = np.asarray(image.convert("L" if shape.channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _BadImageError("picture cannot be decoded") from error
    return pixels.reshape(shape.height, shape.width, shape.channels).transpose(2, 0, 1)
