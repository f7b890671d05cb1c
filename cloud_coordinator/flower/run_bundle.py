"""The Flower App Bundle of one run, made in memory: names of installed apps and configuration.

It carries no code. Our agents read its configuration and check its names; a stock SuperNode imports
what it names from its own installation.
"""

import hashlib
import io
import uuid
import zipfile
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from flwr.supercore.fab import Fab

from shared.tasks.spec import TaskSpec

CLIENT_APP = "edge_agent.training_app:app"
_PROJECT_FILE = "pyproject.toml"
# Flower demands a server app but does not start it: the run's worker plays that part.
SERVER_APP = "cloud_coordinator.rounds.training_rounds:build_server_app"


def run_bundle(
    task: TaskSpec,
    *,
    client_app: str = CLIENT_APP,
    server_app: str = SERVER_APP,
    config: Mapping[str, str] = MappingProxyType({}),
) -> Fab:
    """Return a bundle that no other run has, so that its hash names the run's task.

    Args:
        task: becomes the run configuration ``task``.
        client_app: the installed app that SuperNodes run.
        server_app: the installed app that stock Flower would run.
        config: more of the run configuration.
    """
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
                    "components": {"serverapp": server_app, "clientapp": client_app},
                    "config": {
                        "task": msgspec.json.encode(task).decode(),
                        "session": uuid.uuid4().hex,
                        **config,
                    },
                }
            }
        },
    }
    content = _zip(msgspec.toml.encode(document))
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def _zip(pyproject: bytes) -> bytes:
    """Pack as ``flwr build`` does: the project file, and a list of all files with digest and bits.

    Flower's own function for it lives in its command line, with all that a command line imports.
    """
    listed = f"{_PROJECT_FILE},{hashlib.sha256(pyproject).hexdigest()},{len(pyproject) * 8}"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_PROJECT_FILE, pyproject)
        archive.writestr(".info/CONTENT", listed)
    return packed.getvalue()
