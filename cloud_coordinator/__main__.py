"""Entry point of ``shoal`` and of ``python -m cloud_coordinator``."""

import sys

from cloud_coordinator.cli import app
from shared.errors import ShoalError
from shared.logs import visible


def main() -> None:
    """Run the command; an expected error is one sentence and exit status 1."""
    try:
        app()
    except ShoalError as error:
        words = "\n".join(map(visible, str(error).splitlines()))  # some are of devices
        sys.stderr.write(f"shoal: {words}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
