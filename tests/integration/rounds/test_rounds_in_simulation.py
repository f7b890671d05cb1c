import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.flower.superlink_messages import QUIET_FLOWER
from cloud_coordinator.rounds.checkpoint import load_state
from cloud_coordinator.rounds.worker_messages import ResumePoint, RoundRecord
from tests.integration.rounds.live_rounds import averaged_by_hand, digits_plan, write_digits

ROUNDS = 2
# Not with -m: Ray's workers would look for the program's functions in their own __main__.
PROGRAM = "from tests.integration.rounds.simulate_digits import main; main()"


@pytest.mark.slow  # the contract tests compare the same engine with ours by fewer parts
def test_the_same_apps_give_the_same_parameters_in_flowers_simulation_engine(
    tmp_path: Path,
) -> None:
    data = write_digits(tmp_path)

    simulated = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, str(ROUNDS)],
        check=False,
        timeout=240,
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET_FLOWER, "RAY_USAGE_STATS_ENABLED": "0"},
    )

    assert simulated.returncode == 0, simulated.stderr[-3000:]
    records = msgspec.json.decode((tmp_path / "records.json").read_bytes(), type=list[RoundRecord])
    assert [(r.round_number, r.state) for r in records] == [
        (number, "committed") for number in range(ROUNDS + 1)
    ]
    assert records[-1].metrics["accuracy"] > records[0].metrics["accuracy"]
    last = records[-1].parameters_sha256
    assert last
    point = ResumePoint(round_number=ROUNDS, parameters_sha256=last)
    parameters = load_state(BlobStore(tmp_path / "blobs"), point).parameters
    expected = averaged_by_hand(digits_plan(rounds=ROUNDS), list(data.values()))
    np.testing.assert_allclose(parameters, expected, rtol=1e-5, atol=1e-6)
