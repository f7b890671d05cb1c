"""Work in a process that may crash, hang, or take too much memory, and is gone afterwards."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from edge_agent.inference.trial import CHILD_ENV, describe_exit
from shared.errors import StoppedError, UnavailableError

TIME_LIMIT_S = 300.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of it."""

    out: bytes  # all that it wrote
    how: str  # in words for people, as "was killed by SIGSEGV"


def run_apart(
    module: str,
    asked: bytes,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a module of ours with ``asked`` on its standard input, and wait for its end.

    Args:
        module: what ``python -m`` starts.
        asked: what it reads.
        time_limit_s: wall clock; the process is killed after it.
        should_stop: asked twice a second.

    Raises:
        StoppedError: ``should_stop`` said so.
        UnavailableError: the process could not be started.
    """
    try:
        process = subprocess.Popen(
            (sys.executable, "-m", module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **CHILD_ENV},
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(f"cannot start {module}: {error}; free some memory") from error
    deadline = time.monotonic() + time_limit_s
    # Not by `communicate`: after its first time-out it never writes what is left of the input.
    pipe, process.stdin = process.stdin, None
    writer = threading.Thread(target=_feed, args=(pipe, asked), daemon=True)
    writer.start()
    try:
        while time.monotonic() < deadline:
            if should_stop():
                raise StoppedError("measuring was stopped")
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, _ = process.communicate(timeout=_POLL_S)
                return Ended(out, describe_exit(process.returncode))
        _kill(process)
        out, _ = process.communicate()
        return Ended(out, f"took more than {time_limit_s:g} seconds")
    finally:
        _end(process)
        writer.join()  # nobody reads any more, so it ends at once


def _feed(pipe: "IO[bytes] | None", content: bytes) -> None:
    assert pipe is not None
    with contextlib.suppress(OSError), pipe:  # whoever does not read it says so by ending
        pipe.write(content)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        _kill(process)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
