"""Versions built by the coordinator's own pipeline, and chosen from by the agent's own code."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from cloud_coordinator.compression.service import question_about
from cloud_coordinator.models import pipeline
from cloud_coordinator.models.descriptions import manifest_of
from cloud_coordinator.models.pipeline_messages import (
    BuildVersion,
    Built,
    Calibration,
    MakeProbe,
    VariantReport,
)
from cloud_coordinator.models.tables import ModelVersionRow
from edge_agent.choice import fastest, read_profile, worth_trying
from edge_agent.inference.engine import EngineOptions, open_session
from edge_agent.inference.figures import times_ms
from edge_agent.inference.messages import SelfTestResult
from edge_agent.inference.trial import run_self_test
from edge_agent.measuring import measure_extremes
from edge_agent.slot_files import MANIFEST, MODEL
from shared.compression_plan import CompressionPlan
from shared.errors import UnfitModelError
from shared.manifest import MAX_ARTIFACT_BYTES, Artifact
from shared.messages import utc_now
from shared.parameters import Vector, save_vectors
from shared.run_plan import RunPlan
from shared.signed_manifest import sign_manifest
from shared.signing import SigningKey
from shared.statistics.probes import contract_of_probe, rows_of_probe
from shared.statistics.vectors import StatisticsVector
from shared.tasks.spec import TaskSpec

_RANGE_ROWS = 500  # that ranges are measured on
_TURNS = 40


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file, and how its manifest wants it loaded."""

    content: bytes
    session_config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A version with all its files."""

    task: TaskSpec
    built: Built
    folder: Path

    def report(self, variant: str) -> VariantReport:
        """Return what was measured of a variant; raise UnfitModelError where it did not pass."""
        report = next(r for r in self.built.variants if r.variant == variant)
        if not report.passed:
            raise UnfitModelError(f"{variant} did not pass: {report.cause}")
        return report

    def file(self, variant: str) -> ModelFile:
        """Return a variant's file; raises as `report`."""
        report = self.report(variant)
        return ModelFile((self.folder / report.file).read_bytes(), report.session_config)

    def choose(self) -> tuple[Artifact, Sequence[Artifact], float]:
        """Choose a file as an agent does; return it, all that were tried, and the seconds."""
        manifest = manifest_of(self._row(), self._plan(), self.built, now=utc_now())
        sealed = sign_manifest(manifest, SigningKey.generate()).sealed
        profile = read_profile(largest_bytes=MAX_ARTIFACT_BYTES)
        tried = worth_trying(manifest, profile)[0]
        slots = [self._slot(artifact, sealed) for artifact in tried]
        began = perf_counter()
        verdicts = asyncio.run(run_self_test(slots))
        passed = {
            artifact.sha256: verdict
            for artifact, verdict in zip(tried, verdicts, strict=True)
            if isinstance(verdict, SelfTestResult)
        }
        return fastest(passed, tried), tried, perf_counter() - began

    def _slot(self, artifact: Artifact, sealed: bytes) -> Path:
        slot = self.folder / f"slot-{artifact.variant}"
        slot.mkdir(exist_ok=True)
        (slot / MODEL).write_bytes(self.file(artifact.variant).content)
        (slot / MANIFEST).write_bytes(sealed)
        return slot

    def _plan(self) -> RunPlan:
        return RunPlan(name="bench", task=self.task)

    def _row(self) -> ModelVersionRow:
        return ModelVersionRow(
            run_id="bench", model=self.task.name, rounds=1, parameters_sha256="0" * 64
        )


def build_model(
    task: TaskSpec,
    parameters: Vector,
    inputs: NDArray[np.uint8],
    folder: Path,
    *,
    student: str = "",
) -> BuiltModel:
    """Build every variant, static int8 with ranges of real rows.

    Args:
        task: whose network it is.
        parameters: shape (d,).
        inputs: shape (n, …), rows of devices.
        folder: new, for the files.
        student: of the task's networks; empty: its own.

    Raises:
        UnfitModelError: these parameters can become no version.
    """
    folder.mkdir()
    path = folder / "parameters"
    path.write_bytes(save_vectors({"parameters": parameters}))
    order = MakeProbe(
        task=task, parameters_path=str(path), folder=str(folder), seed=1, student=student
    )
    built = pipeline.build(
        BuildVersion(
            task=task,
            parameters_path=str(path),
            folder=str(folder),
            seed=1,
            student=student,
            calibration=_calibration(order, inputs[:_RANGE_ROWS]),
        ),
        say=lambda _: None,
        clock=perf_counter,
    )
    if not isinstance(built, Built):
        raise UnfitModelError(built.cause)
    return BuiltModel(task, built, folder)


def medians_us(files: Mapping[str, ModelFile], row: NDArray[np.float32]) -> dict[str, float]:
    """Return the median time of one row in each file, in microseconds; all take turns."""
    sessions = {
        name: open_session(file.content, file.session_config, EngineOptions())
        for name, file in files.items()
    }
    calls = {
        name: partial(session.run, None, {session.get_inputs()[0].name: row})
        for name, session in sessions.items()
    }
    times = times_ms(calls, turns=_TURNS)
    return {name: 1000 * float(np.median(each)) for name, each in times.items()}


def _calibration(order: MakeProbe, rows: NDArray[np.uint8]) -> Calibration:
    """Ask one device with these rows, exactly."""
    made = pipeline.probe(order, say=lambda _: None)
    content = (Path(order.folder) / made.file).read_bytes()
    plan = RunPlan(
        name="bench", task=order.task, compression=CompressionPlan(calibration_noise="none")
    )
    question = question_about(made.probe, plan)
    vector = StatisticsVector(question, contract_of_probe(made.probe))
    extremes = measure_extremes(content, made.probe, rows)
    total = vector.contribution(rows_of_probe(made.probe, extremes))
    return Calibration(probe=made.probe, answers=tuple(vector.read(total, sigma=0.0)))
