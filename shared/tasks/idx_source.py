"""Reads IDX files, the format of MNIST and its kin (http://yann.lecun.com/exdb/mnist).

Two files, gzipped or not, belong together: ``NAME-images-idx3-ubyte`` and
``NAME-labels-idx1-ubyte``.
"""

import gzip
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DataError
from shared.tasks.contract import DataContract
from shared.tasks.examples import Examples
from shared.tasks.intake import SkippedRows, not_a_label

_IMAGES = re.compile(r"^(?P<name>.+)-images(?P<dot>[-.])idx3-ubyte(?P<gz>\.gz)?$")
_UNSIGNED_BYTES = 8  # the IDX code of the only element type that images have


def is_idx_images(path: Path) -> bool:
    """Say whether the file's name is that of an IDX file of images."""
    return _IMAGES.match(path.name) is not None


def find_idx_images(folder: Path) -> list[Path]:
    """Return the folder's IDX files of images, sorted."""
    return sorted(path for path in folder.iterdir() if is_idx_images(path))


def read_idx(path: Path, contract: DataContract, skipped: SkippedRows) -> Examples:
    """Read one pair of files, named by its folder or by its file of images.

    Raises:
        DataError: no pair, several pairs, damaged files, or images of another size.
    """
    images_path = _one_pair(path) if path.is_dir() else path
    images = _read_array(images_path, dimensions=3)
    labels = _read_array(_labels_beside(images_path), dimensions=1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images but its labels file {len(labels)} labels; "
            "give files that belong together"
        )
    _check_size(images_path, images.shape[1:], contract)
    strange = labels >= len(contract.labels)
    kept = skipped.keep([(not_a_label(contract.labels), strange)], unit="image")
    return Examples(images[kept][:, np.newaxis], labels[kept].astype(np.int64))


def _check_size(path: Path, size: tuple[int, ...], contract: DataContract) -> None:
    shape = contract.image
    assert shape is not None
    if (*size, 1) != (shape.height, shape.width, shape.channels):
        raise DataError(
            f"{path} holds images of {size[0]} x {size[1]} x 1 where the contract wants "
            f"{shape.height} x {shape.width} x {shape.channels}; "
            "scale the images or correct the task's options"
        )


def _one_pair(folder: Path) -> Path:
    images = find_idx_images(folder)
    if len(images) > 1:
        raise DataError(
            f"{folder} holds several IDX data sets; name one of them: "
            f"{', '.join(path.name for path in images)}"
        )
    return images[0]


def _labels_beside(images: Path) -> Path:
    match = _IMAGES.match(images.name)
    assert match is not None
    plain = images.with_name(f"{match['name']}-labels{match['dot']}idx1-ubyte")
    zipped = plain.with_name(plain.name + ".gz")
    for path in (plain, zipped):
        if path.exists():
            return path
    raise DataError(f"{images} has no labels beside it; put {plain.name} into the same folder")


def _read_array(path: Path, *, dimensions: int) -> NDArray[Any]:
    """Return the unsigned bytes of an IDX file with so many dimensions."""
    content = _read_bytes(path)
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)) or len(content) < header:
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions; check it")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - header != int(np.prod(shape, dtype=np.uint64)):
        raise DataError(f"{path} is cut short or too long; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}; fetch it again") from error
