from pathlib import Path

import numpy as np
import pytest

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.aggregation import ModelState
from cloud_coordinator.rounds.checkpoint import load_state, save_state
from cloud_coordinator.rounds.worker_messages import ResumePoint
from shared.errors import NotFoundError, UntrustedModelError
from shared.parameters import load_parameters


def test_a_state_comes_back_bit_for_bit_with_its_optimiser(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    rng = np.random.default_rng(0)
    state = ModelState(rng.normal(size=9).astype(np.float32), {"momentum": rng.normal(size=9)})

    point = save_state(blobs, state, round_number=3)
    loaded = load_state(blobs, point)

    assert point.round_number == 3
    np.testing.assert_array_equal(loaded.parameters, state.parameters)
    np.testing.assert_array_equal(loaded.optimizer["momentum"], state.optimizer["momentum"])
    np.testing.assert_array_equal(
        load_parameters(blobs.path_of(point.parameters_sha256)), state.parameters
    )


def test_a_state_without_memory_stores_no_optimiser(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    point = save_state(blobs, ModelState(np.ones(2, dtype=np.float32)), round_number=1)

    assert point.optimizer_sha256 is None
    assert load_state(blobs, point).optimizer == {}


def test_a_missing_or_foreign_blob_is_refused(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    foreign = blobs.put(b"no safetensors")

    with pytest.raises(UntrustedModelError):
        load_state(blobs, ResumePoint(round_number=1, parameters_sha256=foreign))
    with pytest.raises(NotFoundError):
        load_state(blobs, ResumePoint(round_number=1, parameters_sha256="0" * 64))
