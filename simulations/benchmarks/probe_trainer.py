"""A real trainer child around the empty app: ``python -m simulations.benchmarks.probe_trainer``."""

from edge_agent.trainer_loop import serve
from simulations.benchmarks.probe_apps import client

if __name__ == "__main__":
    serve(client)
