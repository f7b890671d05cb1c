"""Two hundred rounds of secure sums with devices that fail at random: exact, and nothing is left.

Rounds and devices are the real ones up to the wire, ledgers on disk included; wire and clock are
simulated.
"""

import gc
import logging
import sqlite3
import tracemalloc
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_coordinator.rounds.worker_messages import RoundClosed, RoundRecord, RoundStarted
from edge_agent.privacy.sources import DataUse, Part
from edge_agent.secure_sums import OpenSum, SecureSums
from shared.privacy_plan import PrivacyPlan
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE, SumConfig, decode_config
from shared.secure_sum.keys import SessionSecrets
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import SignedAnswer, decode
from shared.secure_sum.server import SumServer
from shared.signing import open_sealed
from tests.enrolled_homes import FLEET, enrol_homes
from tests.unit.cloud_coordinator.rounds.simulated_fleet import (
    EPOCH,
    SimulatedFleet,
    SimulatedHost,
    plan_of,
)
from tests.unit.cloud_coordinator.rounds.simulated_sums import SumPart

ROUNDS = 200
HALF = ROUNDS // 2
DEVICES = 7
REMEMBERED = 1500  # messages of the last rounds, whose time to live is not over
STAGES = ("train", "share", "mask", "consent", "reveal")
POLICY = "min_cohort = 5\nexact_sums = true\nmax_exact_sums = 100000\n"
OURS = ("shared", "cloud_coordinator", "edge_agent")
ROOT = Path(__file__).parents[3]
SLACK_BYTES = 100_000  # one session of each round that was kept would be megabytes by then


class ShellPart(SumPart):
    """A device's part by the shell that real devices have, with a ledger of its own."""

    def __init__(self, name: str, home: Path, fleet: SimulatedFleet) -> None:
        super().__init__(name)
        self._home, self._fleet = home, fleet
        self.shell = self._start()

    def _start(self) -> SecureSums:
        return SecureSums(
            self._home,
            now=lambda: EPOCH + timedelta(seconds=self._fleet.now_s),
            members=lambda _: self._fleet.members,
        )

    def restart(self) -> None:
        """Lose what is in memory, as a new process would."""
        self.shell.close()
        self.shell = self._start()

    def advertise(
        self, sealed: bytes, vector: NDArray[Any], exact: Mapping[str, float]
    ) -> SignedAnswer:
        opened = self._open(sealed)
        config = opened.config
        wanted = {lane.name: exact[lane.name] for lane in config.exact_lanes}
        if config.purpose == "train":
            vector = vector * np.float32(wanted["examples"] / _largest(config, "examples"))
        self.opened[config.session] = None  # type: ignore[assignment]  # only asked whether it is
        return decode(self.shell.advertise(opened, vector, wanted), SignedAnswer)

    def _open(self, sealed: bytes) -> OpenSum:
        assert self.trusted is not None
        content = open_sealed(
            sealed,
            payload_type=CONFIG_PAYLOAD_TYPE,
            trusted={self.trusted.key_id: self.trusted},
        )
        config = decode_config(content)
        part: Part = "train" if config.purpose == "train" else "held-out"
        return self.shell.open(
            sealed,
            task_digest=config.task_digest,
            question_digest=config.question_digest,
            base_digest=config.base_digest,
            data=DataUse(f"data of {self.name}", part, "0" * 64),
        )

    def answer_with_lanes(
        self, session: bytes, stage: str, question: bytes
    ) -> tuple[SignedAnswer, Lanes | None]:
        if stage == "mask":
            answer, lanes = self.shell.mask(session, question)
            return decode(answer, SignedAnswer), lanes
        return decode(self.shell.answer(session, stage, question), SignedAnswer), None  # type: ignore[arg-type]


def _largest(config: SumConfig, name: str) -> float:
    (lane,) = (lane for lane in config.exact_lanes if lane.name == name)
    return lane.max_steps / lane.steps_per_unit


class Soak:
    """The fleet, what happens to it, and what is known after each round."""

    def __init__(self, folder: Path) -> None:
        self.fleet = SimulatedFleet(DEVICES)
        homes = {name: folder / name for name in self.fleet.devices}
        enrolled = enrol_homes(homes, policy=POLICY, command_key=self.fleet.command_key)
        self.fleet.members = dict(enrolled.members)
        self.parts: dict[str, ShellPart] = {}
        for number, (name, device) in enumerate(self.fleet.devices.items()):
            self.parts[name] = ShellPart(name, homes[name], self.fleet)
            self.parts[name].trusted = self.fleet.command_key.public
            device.sums, device.examples = self.parts[name], 10 + number
        plan = plan_of(
            rounds=ROUNDS,
            evaluate=True,
            size=DEVICES,
            quorum=5,
            round_deadline_s=60,
            privacy=PrivacyPlan(at_least=4, lane_bits=32, clip_norm=8.0, max_weight=30),
        )
        self.host = SimulatedHost(self.fleet, plan, folder / "blobs", scratch=folder / "scratch")
        self.host.fleet = FLEET
        self.host.on_report = self._hear
        self.rng = np.random.default_rng(5)
        self.weighed: dict[int, int] = {}  # bytes of ours in memory, by round
        self.troubles, self.closed = 0, 0

    def _hear(self, report: object) -> None:
        match report:
            case RoundStarted():
                self._trouble()
            case RoundClosed(record):
                self._check(record)
                self._tidy()

    def _trouble(self) -> None:
        """Let up to two devices fail in some way, as many as a round bears."""
        names = list(self.fleet.devices)
        for device in self.fleet.devices.values():
            device.silent_at, device.loses = "", set()
        for name in self.rng.choice(names, self.rng.integers(0, 3), replace=False):
            self.troubles += 1
            device = self.fleet.devices[str(name)]
            stage = STAGES[self.rng.integers(len(STAGES))]
            match self.rng.integers(3):
                case 0:
                    device.silent_at = stage
                case 1:
                    device.loses = set(STAGES[1:])
                case _:
                    later_s = self.fleet.now_s + float(self.rng.uniform(0.5, 1.1))
                    self.fleet.at(later_s, self.parts[str(name)].restart)

    def _check(self, record: RoundRecord) -> None:
        if record.round_number == 0:
            return
        assert record.state == "committed", record.cause
        devices = self.fleet.devices
        counted = [
            devices[part.device_id] for part in record.participations if part.outcome == "replied"
        ]
        assert len(counted) >= 5
        start = self.host.parameters(record.round_number - 1)
        expected = np.average(
            [(start + device.target) / 2 for device in counted],
            axis=0,
            weights=[device.examples for device in counted],
        )
        found = self.host.parameters(record.round_number)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert record.training_sums["examples"] == sum(device.examples for device in counted)

    def _tidy(self) -> None:
        """Forget what only the simulation keeps, and weigh what is left."""
        pushed = self.fleet.pushed
        old = max(0, len(pushed) - REMEMBERED)  # they may no more be asked for; their number counts
        pushed[:old] = pushed[:1] * old
        self.fleet.asked.clear()
        closed = [r for r in self.host.reports if isinstance(r, RoundClosed)]
        self.host.reports = list(closed[-2:])
        for part in self.parts.values():
            part.opened = dict(list(part.opened.items())[-2:])
        self.closed += 1
        if self.closed in {HALF, ROUNDS}:
            self.weighed[self.closed] = _bytes_of_ours()
            self.living = _count_living()

    def close(self) -> None:
        for part in self.parts.values():
            part.shell.close()


def _bytes_of_ours() -> int:
    gc.collect()
    filters = [
        tracemalloc.Filter(inclusive=True, filename_pattern=f"{ROOT}/{name}/*") for name in OURS
    ]
    snapshot = tracemalloc.take_snapshot().filter_traces(filters)
    return sum(trace.size for trace in snapshot.traces)


def _count_living() -> Mapping[str, int]:
    kinds = (SumServer, SumClient, SessionSecrets, Lanes)
    found = gc.get_objects()
    return {kind.__name__: sum(type(one) is kind for one in found) for kind in kinds}


@pytest.mark.slow
def test_two_hundred_rounds_with_random_drops_are_exact_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what is logged, with the errors in it and all that their tracebacks hold.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    soak = Soak(tmp_path)
    soak.fleet.join()
    tracemalloc.start()
    try:
        soak.host.perform()
    finally:
        tracemalloc.stop()
        soak.close()

    assert soak.closed == ROUNDS + 1
    assert soak.troubles > ROUNDS / 2
    assert soak.weighed[ROUNDS] - soak.weighed[HALF] < SLACK_BYTES, soak.weighed
    # One session for training and one for measuring, of the last round each.
    assert soak.living["SumServer"] <= 2, soak.living
    assert soak.living["SumClient"] <= 2 * DEVICES, soak.living
    assert soak.living["SessionSecrets"] <= 2 * DEVICES, soak.living
    assert soak.living["Lanes"] <= 3 * DEVICES, soak.living
    assert list((tmp_path / "scratch").glob("*.sum")) == []
    for name in soak.parts:
        _check_ledger(tmp_path / name / "privacy.db")


def _check_ledger(path: Path) -> None:
    with sqlite3.connect(path) as database:
        states = dict(database.execute("SELECT state, count(*) FROM sessions GROUP BY state"))
        charged = database.execute("SELECT count(*) FROM charges").fetchone()[0]
        spent = database.execute("SELECT count(*) FROM spent").fetchone()[0]
    database.close()
    assert set(states) <= {"revealed", "refused", "lost", "expired"}, states
    assert charged == spent <= 2 * ROUNDS + 1
    assert path.stat().st_size < 2_000_000
