import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.checkpoint import load_state
from cloud_coordinator.rounds.worker_messages import (
    FromWorker,
    ResumePoint,
    RoundRecord,
    RoundStarted,
    RunFailed,
    RunFinished,
    StopRun,
    WaitingForDevices,
)
from shared.child import Child
from shared.parameters import Vector
from tests.integration.rounds.live_rounds import (
    DEADLINE_S,
    LiveRounds,
    averaged_by_hand,
    digits_plan,
    live_rounds,
)


def point_of(record: RoundRecord) -> ResumePoint:
    assert record.parameters_sha256
    return ResumePoint(round_number=record.round_number, parameters_sha256=record.parameters_sha256)


def parameters_of(rounds: LiveRounds, record: RoundRecord) -> Vector:
    return load_state(BlobStore(rounds.home / "blobs"), point_of(record)).parameters


async def test_a_fleet_learns_digits_and_a_killed_worker_costs_one_round(tmp_path: Path) -> None:
    plan = digits_plan(rounds=4)
    async with live_rounds(tmp_path) as rounds:
        await rounds.start_trainers()
        await rounds.start_worker(plan)
        assert await rounds.finish() == 0, rounds.worker and rounds.worker.log_tail()

        whole = rounds.records
        assert rounds.last_word == RunFinished()
        assert [(r.round_number, r.state) for r in whole] == [(n, "committed") for n in range(5)]
        assert whole[0].metrics["accuracy"] < 0.4
        assert whole[-1].metrics["accuracy"] > 0.85
        expected = averaged_by_hand(plan, rounds.data)
        np.testing.assert_allclose(parameters_of(rounds, whole[-1]), expected, rtol=1e-5, atol=1e-6)
        for record in whole[1:]:
            assert {part.outcome for part in record.participations} == {"replied"}

        rounds.records = []
        await rounds.start_worker(plan)
        await _kill_in_round(rounds, 3)
        saved = rounds.records
        assert [r.round_number for r in saved] == [0, 1, 2]
        await rounds.start_worker(plan, resume=point_of(saved[-1]), next_round=3)

        assert await rounds.finish() == 0
        assert [r.round_number for r in rounds.records] == [0, 1, 2, 3, 4]
        np.testing.assert_allclose(
            parameters_of(rounds, rounds.records[-1]), expected, rtol=1e-5, atol=1e-6
        )


async def _kill_in_round(rounds: LiveRounds, number: int) -> None:
    """Kill the worker as soon as the round's cohort is fixed."""
    worker = rounds.worker
    assert worker is not None

    async def kill(message: FromWorker) -> None:
        if isinstance(message, RoundStarted) and message.round_number == number:
            worker.kill()

    rounds.on_message = kill
    assert await rounds.finish() == -9


async def test_a_worker_ends_well_when_told_to_stop_or_forgotten(tmp_path: Path) -> None:
    async with live_rounds(tmp_path) as rounds:
        worker = await rounds.start_worker(digits_plan(rounds=2))

        async def stop(message: FromWorker) -> None:
            if isinstance(message, WaitingForDevices):
                await worker.send(StopRun("a person said so"))

        rounds.on_message = stop
        assert await rounds.finish() == 0
        assert rounds.last_word is None

    orphan = await Child.start(
        [sys.executable, "-m", "cloud_coordinator.rounds.run_worker"],
        name="run worker",
        log_path=tmp_path / "orphan.log",
    )
    assert orphan._process.stdin is not None
    orphan._process.stdin.close()
    assert await asyncio.wait_for(orphan.wait(), DEADLINE_S) == 0, orphan.log_tail()


@pytest.mark.slow
async def test_a_worker_whose_superlink_is_gone_asks_for_a_new_life(tmp_path: Path) -> None:
    async with live_rounds(tmp_path) as rounds:
        await rounds.start_trainers()
        await rounds.start_worker(digits_plan(rounds=50))

        async def kill(message: FromWorker) -> None:
            if isinstance(message, RoundStarted) and message.round_number == 2:
                os.kill(rounds.superlink.pid, signal.SIGKILL)

        rounds.on_message = kill
        assert await rounds.finish() == os.EX_TEMPFAIL
        assert isinstance(rounds.last_word, RunFailed)
        assert "SuperLink" in rounds.last_word.cause
        assert rounds.records[-1].round_number < 50
