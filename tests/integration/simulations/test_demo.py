"""The demo as a newcomer meets it: interrupted, started again, and run to its end."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TIME_LIMIT_S = 120.0
MARK = "SHOAL_TEST_DEMO"  # every process of one demo inherits it
# Digits in place of Fashion-MNIST, wherever that may be: they train in a moment.
DEMO = """
from simulations import datasets
from simulations.__main__ import main
datasets.FASHION_MNIST_FOLDERS = ()
main()
"""


_NUMBERS = itertools.count(1)


class Demo:
    """One demo on a home, with its output in a file."""

    def __init__(self, home: Path, *options: str) -> None:
        self._output = home.parent / f"output-{next(_NUMBERS)}"
        self._mark = f"{MARK}={home}"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", DEMO, "demo", "--home", home, *options],
                env={**os.environ, MARK: str(home)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, pattern: str, log: Path | None = None) -> None:
        """Wait until the output, or a log, shows the pattern."""
        path, deadline = log or self._output, time.monotonic() + TIME_LIMIT_S
        while not (path.exists() and re.search(pattern, path.read_text())):
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait_until_all_ended(self) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        while self.processes():
            assert time.monotonic() < deadline, self.processes()
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal signals the whole foreground group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def wait(self) -> int:
        return self._process.wait(TIME_LIMIT_S)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def processes(self) -> list[str]:
        """Return the commands of all processes that belong to this demo."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # not a process, gone, or not ours
                continue
        return [command for command in found if command]  # a zombie has none


@contextmanager
def demo(home: Path, *options: str) -> Iterator[Demo]:
    running = Demo(home, *options)
    try:
        yield running
    finally:
        running.kill()


def test_an_interrupted_demo_leaves_no_process_and_the_next_goes_on_and_may_be_kept(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    with demo(home, "--rounds", "2") as first:
        first.wait_for("run demo-.*: agent-1 accepted", home / "logs" / "coordinator.log")
        assert len(first.processes()) > 5
        first.interrupt()
        first.wait_for("Ending every process")
        first.interrupt()  # impatient people press it twice
        assert first.wait() == 130
        assert first.processes() == []
        assert "Traceback" not in first.output
        assert "shoal model list --home" in first.output

    with demo(home, "--rounds", "2", "--keep") as second:
        assert second.wait() == 0, second.output
        kept = re.search(r"End it with: kill ([\d ]+)", second.output)
        assert kept is not None, second.output
        programs = [int(word) for word in kept[1].split()]
        try:
            check_what_it_showed(second.output)
            check_that_it_is_alone(home, programs)
            assert len(second.processes()) > len(programs)
        finally:
            for pid in programs:
                os.kill(pid, signal.SIGTERM)
        second.wait_until_all_ended()


def test_fewer_agents_than_their_owners_ask_of_a_sum_are_refused(tmp_path: Path) -> None:
    with demo(tmp_path / "home", "--agents", "4") as refused:
        assert refused.wait() == 1
        assert "4 agents are too few" in refused.output
        assert "take --agents 5 or more" in refused.output
        assert "Traceback" not in refused.output


def check_what_it_showed(output: str) -> None:
    assert "scikit-learn's digits (Fashion-MNIST is not on this machine)" in output
    assert "seed 7" in output
    assert "5 agents are enrolled (0 of them now)" in output
    assert "goes on where it was interrupted" in output
    assert "each round reached the coordinator only as a sum of 5 agents" in output
    rows = re.findall(r"│ agent-\d │ +([\d.]+)% │ +([\d.]+)% │ .* │ verified │", output)
    assert len(rows) == 5
    assert re.search(
        r"agent-\d tried it, alone. Gate latency: it takes [\d.]+ times as long", output
    )
    assert "5 of 5 agents serve the version before" in output
    assert all(float(after) > float(before) for before, after in rows)


def check_that_it_is_alone(home: Path, programs: list[int]) -> None:
    with demo(home) as another:
        assert another.wait() == 1
        assert f"another coordinator (process {programs[0]}) serves" in another.output
        assert "Traceback" not in another.output
