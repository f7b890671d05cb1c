"""``shoal-sim bench rounds``: what Flower's side of a round costs through our two doors.

Real agents are trainer processes with an empty ClientApp in place of ours; light agents are the
same node code, a thread each in one process. Nudges go by pipe in place of MQTT, which adds 1–2 ms
to a round. The reference of empty rounds is stock Flower with subprocess isolation, measured in the
same run. All processes share this machine, so times on it are upper bounds.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import psutil  # type: ignore[import-untyped]
from flwr.app import Message

from cloud_coordinator.flower.grid import RunGrid
from shared.errors import ConfigError
from simulations.benchmarks.federation import Federation, federation, perform_round
from simulations.benchmarks.probe_apps import question
from simulations.benchmarks.report import Row, row_at_most
from simulations.benchmarks.stock_flower import stock_round_seconds

Progress = Callable[[str], None]
_KB, _MB = 1000, 1_000_000
_WAVE = 32  # as the run worker does it
_VECTOR_BYTES = 4 * _MB
_SAMPLE_S = 0.005


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure all rows, or the one named ``only``.

    Args:
        only: name of a row.
        quick: fewer repetitions, and two rounds of stock Flower at most.
        progress: is told what is being measured.

    Raises:
        ConfigError: there is no such row.
        UnavailableError: a part did not come up.
    """
    if only is not None and only not in MEASUREMENTS:
        raise ConfigError(f"there is no row {only!r}; choose one of: {'; '.join(MEASUREMENTS)}")
    rows = []
    for name in MEASUREMENTS if only is None else (only,):
        progress(f"measuring {name} …")
        rows.append(MEASUREMENTS[name](name, quick=quick))
    return rows


def _empty_round(name: str, *, quick: bool, agents: int, limit: float) -> Row:
    """Compare real agents with as many stock SuperNodes."""
    with federation() as fleet:
        fleet.add_trainers(agents)
        value = _median_empty_round(fleet, rounds=10 if quick else 30)
    reference = statistics.median(stock_round_seconds(agents, rounds=2 if quick else 3))
    return row_at_most(name, value, "s", limit=limit, reference=reference)


def _light_round(name: str, *, quick: bool, agents: int, limit: float) -> Row:
    with federation() as fleet:
        fleet.add_light_agents(agents)
        value = _median_empty_round(fleet, rounds=5 if quick else 15)
    return row_at_most(name, value, "s", limit=limit)


def _median_empty_round(fleet: Federation, *, rounds: int) -> float:
    with fleet.run() as grid:
        seconds = [
            perform_round(fleet, grid, _questions(fleet, size=0, form="bytes", number=number))
            for number in range(rounds + 1)
        ]
    return statistics.median(seconds[1:])  # the first meets the run: bundle, connections


def _message_cost(
    name: str, *, quick: bool, agents: int, rounds: int, size: int, form: str, limit: float
) -> Row:
    """Divide the SuperLink's processor time by the messages; one message is both ways."""
    rounds = max(2, rounds // 3) if quick else rounds
    down = bytes(size) if form == "bytes" else b""
    with federation() as fleet:
        fleet.add_light_agents(agents)
        with fleet.run() as grid:
            ask = partial(_questions, fleet, size=size, form=form, down=down)
            perform_round(fleet, grid, ask(number=0))
            before = _processor_s(fleet)
            for number in range(1, rounds + 1):
                perform_round(fleet, grid, ask(number=number))
            spent = _processor_s(fleet) - before
    return row_at_most(name, spent / (rounds * agents) * 1000, "ms", limit=limit)


def _worker_memory(name: str, *, quick: bool) -> Row:
    """Compare what this process needs to fold few replies and many."""
    few, many = 8, 24 if quick else 64
    for_few, for_many = _folding_memory(few), _folding_memory(many)
    return row_at_most(
        name,
        for_many,
        "MB",
        limit=1.3 * for_few,
        reference=for_few,
        target="<= 1.3 x the reference",
    )


def _folding_memory(agents: int) -> float:
    total = np.zeros(_VECTOR_BYTES // 4)

    def fold(reply: Message) -> None:
        (vector,) = reply.content.array_records["answer"].to_numpy_ndarrays()
        np.add(total, vector, out=total)

    with federation() as fleet:
        fleet.add_light_agents(agents)
        with fleet.run() as grid:
            process = psutil.Process()
            return _peak_mb(process, lambda: _vector_rounds(fleet, grid, 2, fold=fold))


def _superlink_memory(name: str, *, quick: bool) -> Row:
    """Compare what the SuperLink needs for uploads in waves with all of them at once."""
    agents = 64 if quick else 96
    with federation() as fleet:
        fleet.add_light_agents(agents)
        with fleet.run() as grid:
            process = psutil.Process(fleet.superlink_pid)
            waves = _peak_mb(process, lambda: _vector_rounds(fleet, grid, 3, wave=_WAVE))
    with federation() as fleet:
        fleet.add_light_agents(agents)
        with fleet.run() as grid:
            process = psutil.Process(fleet.superlink_pid)
            at_once = _peak_mb(process, lambda: _vector_rounds(fleet, grid, 1))
    limit = 2.5 * _WAVE * _VECTOR_BYTES / _MB  # an upload and its copy on the way to the store
    return row_at_most(name, waves, "MB", limit=limit, reference=at_once)


def _vector_rounds(
    fleet: Federation,
    grid: RunGrid,
    rounds: int,
    *,
    wave: int | None = None,
    fold: Callable[[Message], None] = lambda _: None,
) -> None:
    for number in range(rounds):
        messages = _questions(fleet, size=_VECTOR_BYTES, form="vector", number=number)
        perform_round(fleet, grid, messages, wave=wave, fold=fold)


def _idle_cost(name: str, *, quick: bool) -> Row:
    """Watch the SuperLink while joined trainers wait for a nudge."""
    watched_s = 35.0 if quick else 65.0  # holds heartbeats and safety polls
    with federation() as fleet:
        fleet.add_trainers(8)
        with fleet.run():
            before = _processor_s(fleet)
            time.sleep(watched_s)
            spent = _processor_s(fleet) - before
    return row_at_most(name, 100 * spent / watched_s, "% of a core", limit=2)


def _questions(
    fleet: Federation, *, size: int, form: str, number: int, down: bytes = b""
) -> Sequence[Message]:
    """Ask every agent; what goes down differs from agent to agent where it has any size."""
    return [
        question(
            node_id,
            size=size,
            form=form,
            number=number,
            down=node_id.to_bytes(8, "little") + down if down else b"",
        )
        for node_id in fleet.node_ids
    ]


def _processor_s(fleet: Federation) -> float:
    times = psutil.Process(fleet.superlink_pid).cpu_times()
    return float(times.user + times.system)


def _peak_mb(process: psutil.Process, work: Callable[[], None]) -> float:
    """Return by how many megabytes the process grows at most while ``work`` is done."""
    base: int = process.memory_info().rss
    with _sampled(lambda: process.memory_info().rss) as samples:
        work()
    return (max(samples, default=base) - base) / _MB


@contextmanager
def _sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    samples: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            samples.append(read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


MEASUREMENTS: dict[str, Callable[..., Row]] = {
    "empty round, 2 agents": partial(_empty_round, agents=2, limit=0.1),
    "empty round, 8 agents": partial(_empty_round, agents=8, limit=0.25),
    "empty round, 32 light agents": partial(_light_round, agents=32, limit=0.5),
    "empty round, 100 light agents": partial(_light_round, agents=100, limit=1.5),
    "SuperLink CPU per message, 4 KB": partial(
        _message_cost, agents=32, rounds=12, size=4 * _KB, form="bytes", limit=4
    ),
    "SuperLink CPU per message, 0.4 MB": partial(
        _message_cost, agents=32, rounds=6, size=400 * _KB, form="vector", limit=9
    ),
    "SuperLink CPU per message, 4 MB": partial(
        _message_cost, agents=8, rounds=9, size=_VECTOR_BYTES, form="vector", limit=35
    ),
    "worker memory for 64 replies of 4 MB, against 8": _worker_memory,
    "SuperLink memory, 96 uploads of 4 MB in waves, against at once": _superlink_memory,
    "SuperLink CPU, 8 idle agents": _idle_cost,
}
