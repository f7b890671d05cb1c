"""The trainer child around the probe app, for tests: ``python -m tests.contract.flower.…``."""

from edge_agent.trainer_loop import serve
from tests.contract.flower.flower_probe import app

if __name__ == "__main__":
    serve(app)
