"""Child processes that talk in JSON lines over their pipes and never outlive their parent.

Parent side: `Child` starts one, sends and receives typed messages, stops it within a deadline.
Child side: `ParentLink` for a child whose main thread blocks (trainer, run worker).

A child dies with its parent twice over: the kernel sends it SIGKILL when the parent's thread ends
(`PR_SET_PDEATHSIG`), and its standard input closes. Standard error goes to a log file.
"""

import asyncio
import contextlib
import ctypes
import os
import queue
import signal
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

from shared.errors import PeerError, UnavailableError
from shared.files import explained_disk_errors

Incoming = TypeVar("Incoming")
_LINE_LIMIT_BYTES = 4 * 1024 * 1024
_LARGEST_LOG_BYTES = 10 * 1024 * 1024
_PR_SET_PDEATHSIG = 1
_ENCODER = msgspec.json.Encoder()


class Child:
    """A running child. Make one with `Child.start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        name: str,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> "Child":
        """Start ``argv`` in a process group of its own, its standard error appended to a log.

        Args:
            argv: program and arguments.
            name: for people: log lines and errors.
            log_path: where standard error goes; parents are made. A large log makes way.
            env: variables on top of this process's own.
            pass_fds: open files that the child shares, such as a listening socket.

        Raises:
            UnavailableError: the program cannot be started, or its log not be written.
        """
        with _open_log(log_path) as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, **(env or {})},
                    limit=_LINE_LIMIT_BYTES,
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
            except OSError as error:
                raise UnavailableError(f"cannot start {name}: {error}") from error
        return cls(name, process, log_path)

    @property
    def pid(self) -> int:
        """Process id, for logs and tests."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.returncode

    async def send(self, message: msgspec.Struct) -> None:
        """Write one message; a child that is gone swallows it, its exit is reported elsewhere."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(_ENCODER.encode(message) + b"\n")
            await self._process.stdin.drain()

    async def messages(self, kind: Any) -> AsyncIterator[Any]:
        """Yield what the child says until it closes its output.

        Args:
            kind: a struct or a union of structs, which is why the type checker cannot tell.

        Raises:
            PeerError: a line is too long or not a ``kind``; our own child is then another version.
        """
        decoder = msgspec.json.Decoder(kind)
        while line := await self._next_line():
            try:
                message = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise PeerError(f"{self.name} said {line[:200]!r}: {error}") from error
            yield message

    async def wait(self) -> int:
        """Wait for the end and return the exit status."""
        return await self._process.wait()

    async def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask it to end (closed input, SIGTERM), and kill its group when ``timeout_s`` passed."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End the child and its own children at once."""
        self._signal(signal.SIGKILL)

    def log_tail(self, lines: int = 5) -> str:
        """Return the last lines of its log, for an error that a person reads."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    async def _next_line(self) -> bytes:
        assert self._process.stdout is not None
        try:
            return await self._process.stdout.readline()
        except ValueError as error:  # asyncio's word for a line over the limit
            raise PeerError(f"{self.name} said too much in one line: {error}") from error

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class ParentLink(Generic[Incoming]):
    """The child's end: call `die_with_parent` first, then read `incoming` and `send`."""

    def __init__(self, kind: Any) -> None:  # a struct, or a union of structs
        # Libraries print; only our messages may reach the pipe: stdout is moved out of their way.
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        # A reader of its own: the interpreter aborts at exit if a thread still holds sys.stdin.
        self._in = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
        self._lock = threading.Lock()
        self._decoder = msgspec.json.Decoder(kind)
        self.incoming: queue.SimpleQueue[Incoming | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="parent-link", daemon=True).start()

    def send(self, message: msgspec.Struct) -> None:
        """Write one message, from any thread; a parent that is gone swallows it."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._out.write(_ENCODER.encode(message) + b"\n")
            self._out.flush()

    def _read(self) -> None:
        try:
            for line in self._in:
                self.incoming.put(self._decoder.decode(line))
        except msgspec.DecodeError as error:  # our parent is another version: end
            sys.stderr.write(f"the parent said what cannot be understood: {error}\n")
        finally:
            self.incoming.put(None)  # the parent closed the pipe: end


def _open_log(path: Path) -> BinaryIO:
    """Open ``path`` to append to; a large one makes way first, and only the last such is kept."""
    with explained_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LARGEST_LOG_BYTES:
            path.replace(path.with_suffix(".old"))
        return path.open("ab")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent's thread ends; Linux only, a no-op else."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before prctl took hold
        os._exit(1)
