"""The daemon's end of a self-test: starts the throwaway process and turns its end into words."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from edge_agent.inference.messages import SelfTestAnswer, SelfTestRefusal, SelfTestResult
from edge_agent.slot_files import MODEL
from shared.errors import UnavailableError, UnfitModelError

TIME_LIMIT_S = 60.0
_BASE_ALLOWANCE_BYTES = 768 * 1024**2  # for threads, buffers and activations of any model
_COPIES = 4  # of the weights, while ONNX Runtime parses, optimises and packs them
# What one process gets of the environment of all: no thread pools of its own, and one heap, because
# a second would stay as large as it ever was: malloc_trim cuts the end of the first alone.
CHILD_ENV = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}

logger = logging.getLogger(__name__)


async def run_self_test(
    slot: Path, *, time_limit_s: float = TIME_LIMIT_S, memory_bytes: int | None = None
) -> SelfTestResult:
    """Test the model in ``slot`` in a process of its own.

    Args:
        slot: folder of a staged version.
        time_limit_s: wall clock; the process is killed after it.
        memory_bytes: address space for the model; by default in proportion to its file.

    Raises:
        UnfitModelError: the model is refused, crashed the process, hung, or took too much memory.
        UnavailableError: the process could not be started.
    """
    if memory_bytes is None:
        memory_bytes = _allowance(slot)
    argv = [sys.executable, "-m", "edge_agent.inference.self_test", str(slot)]
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
    return _verdict(out, err, process.returncode)


def describe_exit(status: int | None) -> str:
    """Say in words how a process ended."""
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _allowance(slot: Path) -> int:
    with contextlib.suppress(OSError):  # a missing file is the self-test's to report
        return _BASE_ALLOWANCE_BYTES + _COPIES * (slot / MODEL).stat().st_size
    return _BASE_ALLOWANCE_BYTES


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _verdict(out: bytes, err: bytes, status: int | None) -> SelfTestResult:
    lines = out.splitlines()
    try:
        answer: SelfTestAnswer = msgspec.json.decode(
            lines[-1] if lines else b"", type=SelfTestAnswer
        )
    except msgspec.DecodeError:
        logger.warning("self-test said: %s", err.decode(errors="replace")[-2000:])
        raise UnfitModelError(
            f"the model did not survive its self-test: the process {describe_exit(status)}"
        ) from None
    if isinstance(answer, SelfTestRefusal):
        raise UnfitModelError(answer.cause)
    return answer
