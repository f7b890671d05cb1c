"""The program ``shoal-agent``."""

import sys

from edge_agent.cli import app
from shared.errors import ShoalError


def main() -> None:
    """Run one command; an expected error is one sentence on stderr and exit status 1."""
    try:
        app(prog_name="shoal-agent")
    except ShoalError as error:
        sys.stderr.write(f"shoal-agent: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
