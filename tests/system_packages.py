"""What tests need from the operating system: without it they skip, and under CI they fail."""

import os
import shutil
from pathlib import Path

import pytest

from simulations.datasets import FASHION_MNIST_FOLDERS

_POSTGRESQL = Path("/usr/lib/postgresql")  # Debian keeps one folder for each version


def require_program(name: str, *, package: str) -> Path:
    """Return where the program lies; skip, or fail under ``CI=true``, where it is missing."""
    versions = sorted(_POSTGRESQL.glob("*/bin"), reverse=True)
    folders = [os.environ.get("PATH", ""), "/usr/sbin", *map(str, versions)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found) if found else _missing(package)


def require_fashion_mnist() -> Path:
    """Return the folder of the four IDX files; skip, or fail under ``CI=true``, without them."""
    found = next((folder for folder in FASHION_MNIST_FOLDERS if folder.is_dir()), None)
    return found or _missing("dataset-fashion-mnist")


def _missing(package: str) -> Path:
    if os.environ.get("CI") == "true":
        pytest.fail(f"the Debian package {package} is missing")
    pytest.skip(f"needs the Debian package {package}")
