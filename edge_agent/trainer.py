"""The trainer child, alive during a run: the SuperNode role around our ClientApp, and torch."""

import threading

from edge_agent.sum_access import sums_of_process
from edge_agent.trainer_loop import serve
from edge_agent.training_app import build_client_app, home_of, load_from_home


def main() -> None:
    """Train for the daemon until it says stop, closes the pipe or forgets us."""
    interrupted = threading.Event()
    app = build_client_app(
        load_from_home,
        sums_of=lambda context: sums_of_process(home_of(context)),
        should_stop=interrupted.is_set,
    )
    serve(app, sums_in=sums_of_process, interrupted=interrupted)


if __name__ == "__main__":
    main()
