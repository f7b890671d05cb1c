"""Deploys a version once for every file operation that it takes, and dies just before that one.

``python -m tests.integration.inference.crashing_slots FOLDER`` prints the homes it left as JSON.
A real process ends at once, as if it were killed: no ``finally`` runs.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from edge_agent.slots import Slots
from tests.integration.inference.tiny_models import Version, linear

VERSIONS = tuple(linear(seed) for seed in range(4))
_CRASHED = 42
_CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main(folder: Path) -> None:
    """Leave one home for each place to crash at."""
    before, old, new, _ = VERSIONS
    template = folder / "template"
    _deploy(template, before)
    _deploy(template, old)
    _put_download(template, new)
    homes: list[str] = []
    for number in itertools.count(1):
        home = folder / f"crash-{number}"
        shutil.copytree(template, home)
        child = os.fork()
        if child == 0:
            _crash_before_change(number)
            _stage_and_switch(home, new)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in {0, _CRASHED}, f"the deployment failed with {code}"
        homes.append(str(home))
        if code == 0:
            break
    sys.stdout.write(json.dumps(homes))


def _deploy(home: Path, version: Version) -> None:
    _put_download(home, version)
    _stage_and_switch(home, version)


def _put_download(home: Path, version: Version) -> None:
    (home / "models").mkdir(parents=True, exist_ok=True)
    (home / "models" / "download").write_bytes(version.content)


def _stage_and_switch(home: Path, version: Version) -> None:
    slots = Slots(home)
    slots.switch(slots.stage(version.signed.sealed, home / "models" / "download"))


def _crash_before_change(number: int) -> None:
    """End this process when it is about to change the file system for the ``number``-th time."""
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if writes or event in _CHANGES:
            changes += 1
            if changes == number:
                os._exit(_CRASHED)

    sys.addaudithook(watch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
