"""A coordinator and its agents as real processes on this machine: for the demo and for tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

from edge_agent.privacy.policy import POLICY_FILE
from shared.child import die_with_parent
from shared.errors import UnavailableError
from shared.files import make_folder, write_private

T = TypeVar("T")
_STOP_DEADLINE_S = 20.0
_POLL_S = 0.2


class Program:
    """One of our programs as a child process, its output in a log file."""

    def __init__(self, argv: list[str], *, log_path: Path, outlive_us: bool = False) -> None:
        make_folder(log_path.parent)
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if outlive_us else die_with_parent,  # noqa: PLW1509 (one thread)
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End the process itself at once, as a crash would; its children must notice."""
        self._process.kill()
        self._process.wait()

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def wait_stopped(self) -> None:
        """Wait for the end; after a deadline end the whole group."""
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log_tail(self, lines: int = 8) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])


class LocalFleet:
    """Everything under one folder: ``coordinator/`` and ``agents/NAME/``."""

    def __init__(self, home: Path, *, outlive_us: bool = False) -> None:
        self.home = home
        self.coordinator_home = home / "coordinator"
        self.coordinator: Program | None = None
        self.agents: dict[str, Program] = {}
        self._outlive_us = outlive_us
        self._http = httpx.Client(timeout=30, trust_env=False)

    def agent_home(self, name: str) -> Path:
        """Return the state folder of agent ``name``."""
        return self.home / "agents" / name

    def start_coordinator(self, *options: str, deadline_s: float = 60.0) -> None:
        """Start ``shoal serve`` and wait until it is healthy.

        Raises:
            UnavailableError: it ended or was not healthy in time; the message holds its last words.
        """
        argv = ["cloud_coordinator", "serve", "--home", str(self.coordinator_home), *options]
        log_path = self.home / "logs" / "coordinator.log"
        program = Program(argv, log_path=log_path, outlive_us=self._outlive_us)
        self.coordinator = program
        self.wait_for("the coordinator to be healthy", self._healthy, deadline_s=deadline_s)

    def start_agent(self, name: str, *options: str) -> None:
        """Start ``shoal-agent run`` for an enrolled home."""
        argv = ["edge_agent", "run", "--home", str(self.agent_home(name)), *options]
        log_path = self.home / "logs" / f"{name}.log"
        self.agents[name] = Program(argv, log_path=log_path, outlive_us=self._outlive_us)

    def kill_agent(self, name: str) -> None:
        """End an agent at once, as a crash would."""
        self.agents.pop(name).kill()

    def command(self, *argv: str) -> str:
        """Run one of our commands to its end and return what it printed.

        Raises:
            UnavailableError: it failed; the message is what it said.
        """
        done = subprocess.run(
            [sys.executable, "-m", *argv], capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise UnavailableError(f"{' '.join(argv[:3])} failed: {done.stderr.strip()}")
        return done.stdout

    def enroll(self, name: str, token: str, *, policy: str = "") -> None:
        """Enrol agent ``name`` under its own name.

        Args:
            name: names its home as well.
            token: lets it in.
            policy: what its owner writes into ``policy.toml``; with nothing the defaults hold.
        """
        home = str(self.agent_home(name))
        self.command(
            "edge_agent", "enroll", "--home", home, "--coordinator", self.api_url,
            "--token", token, "--name", name,
        )  # fmt: skip
        if policy:
            write_private(self.agent_home(name) / POLICY_FILE, policy.encode())

    @property
    def api_url(self) -> str:
        """Where the REST API listens."""
        return str(self._service()["api_url"])

    def get(self, path: str) -> Any:
        """GET a resource of the REST API as the administrator."""
        return self._request("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        """POST to the REST API as the administrator."""
        return self._request("POST", path, body)

    def wait_for(self, what: str, probe: Callable[[], T | None], *, deadline_s: float) -> T:
        """Ask ``probe`` until it returns something, watching that our programs live.

        Raises:
            UnavailableError: the deadline passed, or a program ended meanwhile.
        """
        return next(self.polls(what, probe, deadline_s=deadline_s))

    def polls(self, what: str, probe: Callable[[], T | None], *, deadline_s: float) -> Iterator[T]:
        """Yield what ``probe`` returns, as often as it returns something, until the deadline."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            self._check_programs(what)
            with contextlib.suppress(httpx.TransportError):
                if (found := probe()) is not None:
                    yield found
            time.sleep(_POLL_S)
        raise UnavailableError(
            f"gave up waiting for {what} after {deadline_s:.0f} s; see {self.home / 'logs'}"
        )

    def stop(self) -> None:
        """End agents first, so that they can say goodbye, then the coordinator."""
        for program in self.agents.values():
            program.ask_to_stop()
        for program in self.agents.values():
            program.wait_stopped()
        if self.coordinator is not None:
            self.coordinator.ask_to_stop()
            self.coordinator.wait_stopped()
        self.agents.clear()
        self.coordinator = None
        self._http.close()

    def _healthy(self) -> bool | None:
        path = self.coordinator_home / "service.json"
        if not path.exists() or self._service().get("pid") != self._coordinator_pid():
            return None
        return True if self._http.get(f"{self.api_url}/v1/health").is_success else None

    def _coordinator_pid(self) -> int | None:
        return self.coordinator.pid if self.coordinator else None

    def _service(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.coordinator_home / "service.json").read_text())
        return document

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        token = (self.coordinator_home / "admin-token").read_text().strip()
        answer = self._http.request(
            method, self.api_url + path, json=body, headers={"Authorization": f"Bearer {token}"}
        )
        if answer.is_error:
            raise UnavailableError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def _check_programs(self, what: str) -> None:
        everyone = {"coordinator": self.coordinator, **self.agents}
        for name, program in everyone.items():
            if program is not None and (status := program.poll()) is not None:
                raise UnavailableError(
                    f"{name} ended with status {status} while waiting for {what}; "
                    f"it said last:\n{program.log_tail()}"
                )
