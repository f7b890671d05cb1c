"""Runs a foreign program that must not outlive us: ``python -m cloud_coordinator.leash PROGRAM …``.

The kernel is asked to kill this process with its parent, then it becomes the program; the request
survives `execv` as long as the program keeps its user.
"""

import os
import sys

from shared.child import die_with_parent


def main() -> None:
    """Become ``sys.argv[1:]``."""
    die_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606  # the caller's own argument list, no shell


if __name__ == "__main__":
    main()
