"""The daemon's end of self-tests: starts the throwaway process and turns its end into words."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.inference.messages import SelfTestAnswer, SelfTestRefusal, SelfTestResult
from edge_agent.slot_files import MODEL
from shared.errors import UnavailableError, UnfitModelError

TIME_LIMIT_S = 60.0
BASE_ALLOWANCE_BYTES = 768 * 1024**2  # for threads, buffers and activations of any model
COPIES = 4  # of the weights, while ONNX Runtime parses, optimises and packs them
# What one process gets of the environment of all: no thread pools of its own, and one heap, because
# a second would stay as large as it ever was: malloc_trim cuts the end of the first alone.
CHILD_ENV = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}

Verdict = SelfTestResult | UnfitModelError
_ANSWER: Any = SelfTestAnswer

logger = logging.getLogger(__name__)


async def run_self_test(
    slots: Sequence[Path], *, time_limit_s: float = TIME_LIMIT_S, memory_bytes: int | None = None
) -> list[Verdict]:
    """Test the model in each of ``slots`` in a process apart, and time them in turns.

    One process tries them all; should it not survive that, each gets a process of its own, so that
    only the guilty one is refused.

    Args:
        slots: folders of staged versions, or of files of one version.
        time_limit_s: wall clock of one process, which is killed after it.
        memory_bytes: address space for the models; by default in proportion to their files.

    Returns:
        What was measured of each, or why it is refused: by itself, or as it crashed the process,
        hung, or took too much memory.

    Raises:
        UnavailableError: no process could be started.
    """
    allowed = sum(map(_allowance, slots)) if memory_bytes is None else memory_bytes
    try:
        return await _try_together(slots, time_limit_s, allowed)
    except UnfitModelError as error:
        if len(slots) == 1:
            return [error]
    logger.warning("one of %d models ended the self-test of all; trying each alone", len(slots))
    alone = [
        await run_self_test([slot], time_limit_s=time_limit_s, memory_bytes=memory_bytes)
        for slot in slots
    ]
    return [verdict for (verdict,) in alone]


async def _try_together(
    slots: Sequence[Path], time_limit_s: float, memory_bytes: int
) -> list[Verdict]:
    """Return the answers of one process; raise UnfitModelError unless it survived."""
    argv = [sys.executable, "-m", "edge_agent.inference.self_test", *map(str, slots)]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            f"--memory-bytes={memory_bytes}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **CHILD_ENV},
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(f"cannot start the self-test: {error}; free some memory") from error
    try:
        async with asyncio.timeout(time_limit_s):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise UnfitModelError(
            f"the model did not finish its self-test within {time_limit_s:g} seconds"
        ) from error
    finally:
        await _end(process)
    return _verdicts(out, err, process.returncode, len(slots))


def describe_exit(status: int | None) -> str:
    """Say in words how a process ended."""
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _allowance(slot: Path) -> int:
    with contextlib.suppress(OSError):  # a missing file is the self-test's to report
        return BASE_ALLOWANCE_BYTES + COPIES * (slot / MODEL).stat().st_size
    return BASE_ALLOWANCE_BYTES


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _verdicts(out: bytes, err: bytes, status: int | None, count: int) -> list[Verdict]:
    lines = out.splitlines()[-count:]
    try:
        answers = [msgspec.json.decode(line, type=_ANSWER) for line in lines]
    except msgspec.DecodeError:
        answers = []
    if len(answers) < count:
        logger.warning("self-test said: %s", err.decode(errors="replace")[-2000:])
        raise UnfitModelError(
            f"the model did not survive its self-test: the process {describe_exit(status)}"
        )
    return [
        UnfitModelError(answer.cause) if isinstance(answer, SelfTestRefusal) else answer
        for answer in answers
    ]
