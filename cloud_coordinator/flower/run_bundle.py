"""The Flower App Bundle of one run, made in memory: names of installed apps and configuration.

It carries no code. Our agents read its configuration and check its names; a stock SuperNode imports
what it names from its own installation.
"""

import hashlib
import uuid

import msgspec
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab

from shared.tasks.spec import TaskSpec

CLIENT_APP = "edge_agent.training_app:app"
# Flower demands a server app but does not start it: the run's worker plays that part.
_SERVER_APP = "cloud_coordinator.rounds.training_rounds:app"


def run_bundle(task: TaskSpec, *, client_app: str = CLIENT_APP) -> Fab:
    """Return a bundle that no other run has, so that its hash names the run's task."""
    document = {
        "project": {
            "name": "shoal-run",
            "version": "1.0.0",
            "description": "One Shoal run; names installed apps and holds no code.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "shoal",
                    "components": {"serverapp": _SERVER_APP, "clientapp": client_app},
                    "config": {
                        "task": msgspec.json.encode(task).decode(),
                        "session": uuid.uuid4().hex,
                    },
                }
            }
        },
    }
    content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(document).encode()})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})
