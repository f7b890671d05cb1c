"""Entry point of ``shoal-sim``: an expected failure is one sentence and exit status 1."""

import sys

from shared.errors import ShoalError
from simulations.cli import app


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ShoalError as error:
        sys.exit(f"shoal-sim: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
