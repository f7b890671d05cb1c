"""A small secure round over real MQTT, TLS and Flower: the benchmark checks what it measures."""

import numpy as np
import pytest

from cloud_coordinator.rounds.sum_session import GroupSum
from simulations.benchmarks import secure_session
from simulations.benchmarks.light_sums import drawn_lanes
from simulations.benchmarks.secure_round import Setting, check_sum, secure_rounds
from simulations.benchmarks.secure_sum import MEASUREMENTS
from tests.system_packages import require_program

SMALL = Setting(devices=6, lost=1, length=1000, at_least=4)


def test_the_sum_of_a_round_is_exact_though_a_device_is_lost_after_its_vector_left() -> None:
    require_program("mosquitto", package="mosquitto")

    (measured,) = secure_rounds(SMALL, repeats=1)

    assert measured.survivors == 6  # with the vector of the one that was lost
    assert measured.seconds < 30
    assert 0 < measured.protocol_s < measured.processor_s
    assert set(measured.stage_seconds) == {"train", "share", "mask", "consent", "reveal"}


def test_a_sum_that_is_not_exact_is_no_measurement() -> None:
    config = secure_session.Session(secure_session.Setting(3, 10, 16)).config
    lanes = drawn_lanes(config, place=0)
    group = GroupSum(group=0, config=config, roster=3, lanes=lanes)
    check_sum(group, [0])

    lanes.main[-1] += np.uint16(1)

    with pytest.raises(AssertionError, match="not that of the survivors' encodings"):
        check_sum(group, [0])


def test_the_rows_of_whole_rounds_are_part_of_the_benchmark() -> None:
    for devices in (100, 256):
        assert f"devices' own CPU of it, {devices} light agents" in MEASUREMENTS
    assert "secure round, 100 light agents, d=10^5, 10 lost on the way" in MEASUREMENTS
    assert "secure round, 256 light agents, d=10^5" in MEASUREMENTS
