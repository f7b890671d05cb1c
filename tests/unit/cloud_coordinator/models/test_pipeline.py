import hashlib
import time
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cloud_coordinator.compression.service import question_about
from cloud_coordinator.models import candidates, pipeline, probing
from cloud_coordinator.models.export import TrainedModel
from cloud_coordinator.models.parity import open_session
from cloud_coordinator.models.pipeline_messages import (
    FP32,
    BuildFailed,
    BuildVersion,
    Built,
    Calibration,
    MakeProbe,
)
from cloud_coordinator.models.quantise import Variant, variants_for
from cloud_coordinator.models.static_int8 import KINDS
from shared.compression_plan import CompressionPlan
from shared.errors import UnavailableError, UnfitModelError
from shared.parameters import load_parameters, save_vectors
from shared.run_plan import RunPlan
from shared.statistics.probes import contract_of_probe, extremes_of, rows_of_probe
from shared.statistics.vectors import StatisticsVector
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector

SPEC = TaskSpec(
    "health",
    "tabular",
    {
        "kind": "classification",
        "model": "mlp",
        "features": [{"name": n, "minimum": 0.0, "maximum": 9.0} for n in ("age", "weight")],
        "target": "state",
        "labels": ["well", "ill", "unknown"],
    },
)


def order_in(folder: Path) -> BuildVersion:
    parameters = to_vector(seeded_model(load_task(SPEC), 0))
    (folder / "parameters").write_bytes(save_vectors({"parameters": parameters}))
    return BuildVersion(
        task=SPEC, parameters_path=str(folder / "parameters"), folder=str(folder), seed=3
    )


def build(order: BuildVersion) -> Built | BuildFailed:
    return pipeline.build(order, say=lambda _: None, clock=time.perf_counter)


def altered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with one of its weights turned around."""
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    weight = max(broken.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    return broken


def crashing(_model: onnx.ModelProto) -> onnx.ModelProto:
    raise KeyError("a converter's own bug")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """Build once, with two variants that must not get through."""
    folder = tmp_path_factory.mktemp("pipeline")
    broken = (Variant("broken", altered, 0.05), Variant("crashing", crashing, 0.05))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "variants_for", lambda model: (*variants_for(model), *broken))
        result = build(order_in(folder))
    assert isinstance(result, Built)
    return folder, result


def test_every_variant_that_passed_is_a_file_with_its_digest_and_size(
    built: tuple[Path, Built],
) -> None:
    folder, result = built
    passed = [report for report in result.variants if report.passed]
    assert {FP32, "fp16", "int8-weights"} <= {report.variant for report in passed}
    for report in passed:
        content = (folder / report.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == report.sha256
        assert len(content) == report.size_bytes
        assert report.latency_p50_us is not None
        assert report.latency_p50_us > 0
        onnx.checker.check_model(onnx.load_from_string(content))
    assert result.ship in {report.variant for report in passed}


def test_a_variant_with_altered_weights_is_caught_measured_and_left_out(
    built: tuple[Path, Built],
) -> None:
    _, result = built
    report = next(r for r in result.variants if r.variant == "broken")
    assert not report.passed
    assert "off by" in report.cause
    assert report.relative_error is not None
    assert report.relative_error > 0.05
    assert not report.file
    assert report.latency_p50_us is not None  # for the table


def test_a_converter_that_crashes_costs_its_own_variant_only(built: tuple[Path, Built]) -> None:
    report = next(r for r in built[1].variants if r.variant == "crashing")
    assert not report.passed
    assert "a converter's own bug" in report.cause
    assert report.size_bytes == 0


def test_compressed_variants_tell_no_more_of_the_source_than_fp32(
    built: tuple[Path, Built],
) -> None:
    folder, result = built
    for report in result.variants:
        if report.passed:
            content = (folder / report.file).read_bytes()
            for leak in (b"torch", b".py", b"onnx.quantize", b"tabular", b"stack_trace"):
                assert leak not in content


def test_the_golden_batch_is_torchs_and_the_shipped_variant_meets_it(
    built: tuple[Path, Built],
) -> None:
    folder, result = built
    golden = result.golden
    inputs = np.frombuffer(golden.inputs, "<f4").reshape(golden.rows, 2)
    outputs = np.frombuffer(golden.outputs, "<f4").reshape(golden.rows, 3)
    truth = TrainedModel(load_task(SPEC), load_parameters(folder / "parameters")).outputs(inputs)
    np.testing.assert_array_equal(outputs, truth)
    shipped = next(r for r in result.variants if r.variant == result.ship)
    session = open_session((folder / shipped.file).read_bytes(), shipped.session_config)
    (served,) = session.run(None, {result.inputs[0].name: inputs})
    assert np.abs(np.asarray(served) - outputs).max() <= golden.tolerance
    assert golden.tolerance < 0.1 * outputs.std()


def test_a_students_parameters_are_built_as_its_own_network(tmp_path: Path) -> None:
    student = load_task(SPEC).student("linear")
    parameters = to_vector(seeded_model(student, 0))
    (tmp_path / "parameters").write_bytes(save_vectors({"parameters": parameters}))
    order = BuildVersion(
        task=SPEC,
        parameters_path=str(tmp_path / "parameters"),
        folder=str(tmp_path),
        seed=3,
        student="linear",
    )
    made = build(order)
    assert isinstance(made, Built), made
    assert made.student == "linear"
    assert made.labels == student.labels
    golden = np.frombuffer(made.golden.inputs, "<f4").reshape(made.golden.rows, -1)
    truth = TrainedModel(student, parameters).outputs(golden)
    np.testing.assert_array_equal(truth.ravel(), np.frombuffer(made.golden.outputs, "<f4"))


def test_every_variant_that_passed_has_a_tolerance_of_its_own(built: tuple[Path, Built]) -> None:
    folder, result = built
    inputs = np.frombuffer(result.golden.inputs, "<f4").reshape(result.golden.rows, 2)
    wanted = np.frombuffer(result.golden.outputs, "<f4").reshape(result.golden.rows, 3)
    allowed = {r.variant: r.tolerance for r in result.variants if r.passed}
    for report in result.variants:
        assert (report.tolerance is not None) == report.passed
        if report.tolerance is not None:
            session = open_session((folder / report.file).read_bytes(), report.session_config)
            (served,) = session.run(None, {result.inputs[0].name: inputs})
            assert np.abs(np.asarray(served) - wanted).max() <= report.tolerance
    assert allowed["fp32"] is not None
    assert allowed["int8-weights"] is not None
    assert allowed["fp32"] < allowed["int8-weights"]
    assert allowed[result.ship] == result.golden.tolerance


def test_labels_and_signature_are_the_tasks(built: tuple[Path, Built]) -> None:
    _, result = built
    task = load_task(SPEC)
    assert (result.inputs, result.outputs) == ((task.input,), (task.output,))
    assert result.labels == ("well", "ill", "unknown")


def test_nothing_is_built_when_the_export_itself_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "variants_for", lambda _: (Variant(FP32, altered, 1e-4),))
    result = build(order_in(tmp_path))
    assert isinstance(result, BuildFailed)
    assert result.rejected
    assert "does not compute what was trained" in result.cause
    assert [report.passed for report in result.variants] == [False]


def test_a_full_disk_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, _content: bytes) -> None:
        raise UnavailableError(f"no space left on the disk that holds {path.parent}")

    monkeypatch.setattr(candidates, "write_atomic", no_space)
    with pytest.raises(UnavailableError, match="no space"):
        build(order_in(tmp_path))


def calibrated(folder: Path, *, exact: bool) -> BuildVersion:
    """Ask a fleet of one device, whose rows are drawn from the contract, and order a build."""
    order = order_in(folder)
    made = pipeline.probe(
        MakeProbe(
            task=order.task,
            parameters_path=order.parameters_path,
            folder=order.folder,
            seed=order.seed,
        ),
        say=lambda _: None,
    )
    inputs = load_task(SPEC).example_inputs(np.random.default_rng(9), 500).astype(np.float32)
    session = open_session((folder / made.file).read_bytes(), {})
    outputs = session.run(None, {session.get_inputs()[0].name: inputs})
    named = dict(zip(made.probe.tensors, map(np.asarray, outputs), strict=True))
    noise: Literal["none", "distributed"] = "none" if exact else "distributed"
    plan = RunPlan(name="health", task=SPEC, compression=CompressionPlan(calibration_noise=noise))
    question = question_about(made.probe, plan)
    vector = StatisticsVector(question, contract_of_probe(made.probe))
    total = vector.contribution(rows_of_probe(made.probe, extremes_of(made.probe, named)))
    answers = tuple(vector.read(total, sigma=0.0 if exact else 0.05))
    return msgspec.structs.replace(
        order, calibration=Calibration(probe=made.probe, answers=answers)
    )


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "noised"])
def test_ranges_that_devices_measured_make_three_kinds_of_static_int8(
    tmp_path: Path, *, exact: bool
) -> None:
    result = build(calibrated(tmp_path, exact=exact))
    assert isinstance(result, Built)
    reports = {report.variant: report for report in result.variants}
    for kind in KINDS:
        report = reports[kind.name]
        assert report.passed, report.cause
        assert report.step.startswith("q0.999" if exact else "mean+1")
        assert report.needs == kind.needs
        assert report.relative_error is not None
        assert 0 < report.relative_error < 0.05


def test_answers_about_another_model_cost_static_int8_only(tmp_path: Path) -> None:
    order = calibrated(tmp_path, exact=True)
    assert order.calibration is not None
    probe = order.calibration.probe
    other = msgspec.structs.replace(probe, columns=probe.columns[1:])
    calibration = msgspec.structs.replace(order.calibration, probe=other)
    result = build(msgspec.structs.replace(order, calibration=calibration))
    assert isinstance(result, Built)
    for report in result.variants:
        if report.variant in {kind.name for kind in KINDS}:
            assert "the devices were not asked about" in report.cause
    assert result.ship in {"fp32", "fp16", "int8-weights", "int8-dynamic"}


def test_a_graph_that_cannot_be_probed_is_no_fault_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(_: onnx.ModelProto) -> list[str]:
        raise KeyError("no such operator")

    monkeypatch.setattr(probing, "float_tensors", stumble)
    order = order_in(tmp_path)
    with pytest.raises(UnfitModelError, match="its ranges cannot be found: KeyError"):
        pipeline.probe(
            MakeProbe(
                task=order.task,
                parameters_path=order.parameters_path,
                folder=order.folder,
                seed=order.seed,
            ),
            say=lambda _: None,
        )
