"""What a model that came with a message may do to the device that runs it on its rows."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.measuring import measure_extremes
from shared.errors import PeerError, StoppedError, UnfitModelError
from shared.statistics.probes import Probe, ProbeColumn
from tests.integration.inference.tiny_models import (
    CLASSES,
    FEATURES,
    build,
    endless,
    gigantic,
    linear,
    not_finite,
)

PROBE = Probe(
    model_sha256="a" * 64, columns=(ProbeColumn("y", "high", 0.0), ProbeColumn("y", "low", 0.0))
)
ROWS = np.random.default_rng(0).normal(size=(70, FEATURES)).astype(np.float32)


def measuring() -> list[int]:
    """Return the processes of this one that measure."""
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text()
    return [
        int(pid)
        for pid in children.split()
        if b"inference.measure" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_each_rows_extremes_come_back_in_order() -> None:
    found = measure_extremes(linear().content, PROBE, ROWS)
    outputs = ROWS @ linear().weights
    np.testing.assert_allclose(found[:, 0], outputs.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], -outputs.min(axis=1), rtol=1e-5)


def test_no_rows_give_no_extremes() -> None:
    assert measure_extremes(linear().content, PROBE, ROWS[:0]).shape == (0, 2)


def test_outputs_that_are_no_numbers_come_back_as_they_are() -> None:
    assert np.isnan(measure_extremes(not_finite().content, PROBE, ROWS[:3])).all()


def test_a_model_that_does_not_load_is_refused_whatever_the_rows_are() -> None:
    for content in (b"not a model", linear().content[:-20]):
        with pytest.raises(PeerError, match="the model does not load"):
            measure_extremes(content, PROBE, ROWS)


def test_a_model_with_other_outputs_than_were_asked_about_is_refused() -> None:
    more = Probe(model_sha256="a" * 64, columns=(*PROBE.columns, ProbeColumn("z", "high", 0.0)))
    with pytest.raises(PeerError, match="1 inputs and 1 outputs for 2 tensors"):
        measure_extremes(linear().content, more, ROWS)


def test_a_model_that_takes_weights_from_another_file_is_refused(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((FEATURES, CLASSES), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", str(tmp_path / "secret")
    content = build([helper.make_node("MatMul", ["x", "w"], ["y"])], [weights])
    with pytest.raises(PeerError, match="takes data from another file"):
        measure_extremes(content, PROBE, ROWS)


def test_a_model_that_hangs_on_the_rows_is_ended_in_time() -> None:
    with pytest.raises(UnfitModelError, match="took more than 3 seconds"):
        measure_extremes(endless().content, PROBE, ROWS, time_limit_s=3)
    assert not measuring()


def test_a_model_that_eats_memory_fails_alone() -> None:
    with pytest.raises(UnfitModelError, match="the model failed: the process"):
        measure_extremes(gigantic().content, PROBE, ROWS)


def test_measuring_ends_as_soon_as_it_is_to_stop() -> None:
    answers = iter([False, True])
    with pytest.raises(StoppedError):
        measure_extremes(endless().content, PROBE, ROWS, should_stop=lambda: next(answers))
    assert not measuring()


def test_nothing_of_the_rows_touches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    measure_extremes(linear().content, PROBE, ROWS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module", ["edge_agent.inference.engine", "cloud_coordinator.models.parity"]
)
def test_onnx_runtime_does_not_report_to_its_maker(tmp_path: Path, module: str) -> None:
    """With its telemetry on, loading it leaves a session number in the folder of temporaries.

    The environment is bare, for a variable like `CI` alone keeps it silent.
    """
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    loads = [sys.executable, "-c", f"import {module}"]
    subprocess.run(loads, env=env, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
    subprocess.run([sys.executable, "-c", "import onnxruntime"], env=env, check=True, timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == [".ses"]
