"""Secure rounds of real processes: worker, SuperLink and trainers, with pipes in place of MQTT."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cloud_coordinator.rounds.worker_messages import AskDevices, FromWorker, RunFinished
from tests.integration.rounds.live_rounds import (
    SECURE_DEVICES,
    SUMS_MAY_LEAVE,
    averaged_by_hand,
    live_rounds,
    secure_plan,
)
from tests.integration.rounds.test_rounds_over_superlink import parameters_of, point_of


async def test_a_fleet_learns_digits_by_sums_alone(tmp_path: Path) -> None:
    plan = secure_plan(rounds=3)
    async with live_rounds(tmp_path, names=SECURE_DEVICES, policy=SUMS_MAY_LEAVE) as rounds:
        await rounds.start_trainers()
        await rounds.start_worker(plan)
        assert await rounds.finish() == 0, rounds.worker and rounds.worker.log_tail(20)

    assert rounds.last_word == RunFinished()
    assert [record.state for record in rounds.records] == ["committed"] * 4
    assert rounds.records[-1].metrics["accuracy"] > 0.8
    expected = averaged_by_hand(plan, rounds.data)
    # 16 bits for a norm of 4: some 0.001 per parameter and round.
    np.testing.assert_allclose(parameters_of(rounds, rounds.records[-1]), expected, atol=0.01)
    for record in rounds.records[1:]:
        assert {part.outcome for part in record.participations} == {"replied"}
        assert {part.num_examples for part in record.participations} == {0}
        assert record.secrecy is not None
        assert record.secrecy.groups[0].survivors == len(SECURE_DEVICES)
        size = expected.size
        assert record.secrecy.bytes_up < 2 * size + 8 * 3 + 4096


@pytest.mark.parametrize("stage", [pytest.param("consent", marks=pytest.mark.slow), "reveal"])
async def test_a_worker_killed_while_unmasking_is_followed_by_one_that_finishes_that_very_sum(
    tmp_path: Path, stage: str
) -> None:
    plan = secure_plan(rounds=2)
    async with live_rounds(tmp_path, names=SECURE_DEVICES, policy=SUMS_MAY_LEAVE) as rounds:
        sessions: dict[int, set[bytes]] = {}

        async def kill_once(message: FromWorker) -> None:
            if isinstance(message, AskDevices) and rounds.records and message.stage == stage:
                lives = sessions.setdefault(len(rounds.records), set())
                if not lives and len(rounds.records) == 1:
                    assert rounds.worker is not None
                    os.kill(rounds.worker.pid, signal.SIGKILL)
                lives.add(message.session)

        rounds.on_message = kill_once
        await rounds.start_trainers()
        await rounds.start_worker(plan)
        assert await rounds.finish() == -signal.SIGKILL
        [initial] = rounds.records
        await rounds.start_worker(plan, resume=point_of(initial), next_round=1)
        assert await rounds.finish() == 0, rounds.worker and rounds.worker.log_tail(20)

    assert [record.state for record in rounds.records] == ["committed"] * 3
    first = rounds.records[1]
    assert first.secrecy is not None
    assert first.secrecy.groups[0].survivors == len(SECURE_DEVICES)
    assert not list((tmp_path / "scratch").glob("*.sum"))
    expected = averaged_by_hand(plan, rounds.data)
    np.testing.assert_allclose(parameters_of(rounds, rounds.records[-1]), expected, atol=0.01)
