"""The trainer child, alive during a run: the SuperNode role around our ClientApp, and torch."""

from edge_agent.trainer_loop import serve
from edge_agent.training_app import app


def main() -> None:
    """Train for the daemon until it says stop, closes the pipe or forgets us."""
    serve(app)


if __name__ == "__main__":
    main()
