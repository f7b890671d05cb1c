"""Runs a foreign server that must not outlive us, nor be root because we are.

``python -m cloud_coordinator.leash FOLDER PROGRAM ARGUMENT …`` enters the folder, gives up root
where it has it, asks the kernel to kill this process with its parent, and becomes the program. The
kernel forgets that wish when a process changes its user, so a server must not be left to do so.
"""

import os
import pwd
import sys
from pathlib import Path

from shared.child import die_with_parent

_FALLBACK_ACCOUNT = "nobody"


def main() -> None:
    """Become the program that the arguments name."""
    folder, program, *arguments = sys.argv[1:]
    os.chdir(folder)  # reachable from now on, though the folders above may be root's alone
    if os.geteuid() == 0:
        _give_up_root(account=Path(program).name)
    die_with_parent()
    os.execv(program, [program, *arguments])  # noqa: S606  # the caller's own list, no shell


def _give_up_root(*, account: str) -> None:
    """Hand the folder that we are in to the program's own account, and become it."""
    try:
        entry = pwd.getpwnam(account)
    except KeyError:
        entry = pwd.getpwnam(_FALLBACK_ACCOUNT)
    for path in (Path(), *Path().rglob("*")):
        os.chown(path, entry.pw_uid, entry.pw_gid)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


if __name__ == "__main__":
    main()
