"""What holds for all tests."""

import os


def pytest_configure() -> None:
    """Let commands print as into any pipe: unwrapped; pytest-xdist exports a width."""
    os.environ.pop("COLUMNS", None)
