"""``shoal-sim bench models``: how small and fast compression makes networks, and who chooses best.

Every network goes through the coordinator's pipeline with ranges measured on real pictures, and the
agent's own code chooses among its files. Sizes and times do not depend on what was learned, so the
weights are the initial ones; ``models-accuracy`` trains them.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from cloud_coordinator.models.static_int8 import KINDS
from shared.errors import ConfigError
from shared.tasks.registry import load_task
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector
from simulations.benchmarks.built_models import BuiltModel, ModelFile, build_model, medians_us
from simulations.benchmarks.report import Row, row_at_least, row_at_most
from simulations.datasets import load_images

Progress = Callable[[str], None]
INT8_SIZE = "wide-cnn, 35.6 MMAC, in static int8: size"
INT8_SPEED = "wide-cnn, 35.6 MMAC, in static int8: one row"
LARGE_SIZE = "wide-cnn, 2.8 M parameters, to small-cnn: size"
LARGE_SPEED = "wide-cnn, 2.8 M parameters, to small-cnn: one row"
MIDDLE_SIZE = "mid-cnn, 203 k parameters, to small-cnn-half: size"
MIDDLE_SPEED = "mid-cnn, 203 k parameters, to small-cnn-half: one row"
SELECTOR = "what a device chooses against the fastest it has, worst of 5 networks"
CHOICE = "how long it chooses, slowest of 5 networks"
_NETWORKS = ("small-cnn", "small-cnn-half", "lenet-5", "mid-cnn", "wide-cnn")
_ROWS = (
    INT8_SIZE, INT8_SPEED, LARGE_SIZE, LARGE_SPEED, MIDDLE_SIZE, MIDDLE_SPEED, SELECTOR, CHOICE,
)  # fmt: skip


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure all rows, or one.

    Args:
        only: the name of one row, or None.
        quick: fewer repetitions.
        progress: is told what is being measured.

    Raises:
        ConfigError: there is no such row.
    """
    if only is not None and only not in _ROWS:
        raise ConfigError(f"there is no row {only!r}; choose one of: {'; '.join(_ROWS)}")
    turns = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        models = _build(Path(folder), progress)
        rows = [
            *_int8(models["wide-cnn"], turns),
            *_pipeline(models["wide-cnn"], models["small-cnn"], turns, large_target=True),
            *_pipeline(models["mid-cnn"], models["small-cnn-half"], turns, large_target=False),
            *_selector(models, turns, progress),
        ]
    return [row for row in rows if only in {None, row.name}]


def _build(folder: Path, progress: Progress) -> Mapping[str, BuiltModel]:
    data = load_images(None)
    models = {}
    for name in _NETWORKS:
        progress(f"building {name}")
        task = data.task(name="images", model=name)
        parameters = to_vector(seeded_model(load_task(task), 1))
        models[name] = build_model(task, parameters, data.train.inputs, folder / name)
    return models


def _row() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return load_images(None).test.inputs[:1].astype(np.float32)


def _int8(model: BuiltModel, turns: int) -> list[Row]:
    """Compare the static int8 that this processor is best at with fp32."""
    static = {kind.name: model.file(kind.name) for kind in KINDS}
    speeds = medians_us(static, _row())
    fastest = min(static, key=speeds.__getitem__)
    files = {"fp32": model.file("fp32"), "int8": static[fastest]}
    times = _medians(files, turns)
    sizes = {name: float(len(file.content)) for name, file in files.items()}
    return [
        row_at_least(INT8_SIZE, sizes["int8"], "bytes", reference=sizes["fp32"], least=3.6),
        row_at_least(INT8_SPEED, times["int8"], "us", reference=times["fp32"], least=2.5),
    ]


def _pipeline(large: BuiltModel, small: BuiltModel, turns: int, *, large_target: bool) -> list[Row]:
    """Compare what is shipped of a student with its teacher's fp32."""
    files = {"before": large.file("fp32"), "after": small.file(small.built.ship)}
    times = _medians(files, turns)
    size, speed = (LARGE_SIZE, LARGE_SPEED) if large_target else (MIDDLE_SIZE, MIDDLE_SPEED)
    smaller, faster = (100.0, 8.0) if large_target else (10.0, 2.5)
    before, after = (float(len(files[name].content)) for name in ("before", "after"))
    return [
        row_at_least(size, after, "bytes", reference=before, least=smaller),
        row_at_least(speed, times["after"], "us", reference=times["before"], least=faster),
    ]


def _selector(models: Mapping[str, BuiltModel], turns: int, progress: Progress) -> list[Row]:
    """Let a device choose, then time all its files afresh."""
    ratios, seconds = {}, []
    for name, model in models.items():
        found = []
        for _ in range(max(1, turns // 2)):
            chosen, tried, took = model.choose()
            seconds.append(took)
            times = _medians({a.variant: model.file(a.variant) for a in tried}, turns)
            found.append(times[chosen.variant] / min(times.values()))
        ratios[name] = statistics.median(found)
        progress(f"{name}: chose {chosen.variant}, {ratios[name]:.3f} times the fastest")
    return [
        row_at_most(SELECTOR, max(ratios.values()), "x", limit=1.05),
        row_at_most(CHOICE, max(seconds), "s", limit=1.0),
    ]


def _medians(files: Mapping[str, ModelFile], turns: int) -> dict[str, float]:
    """Return each file's time of one row in microseconds, the median over some measurements."""
    measured = [medians_us(files, _row()) for _ in range(turns)]
    return {name: statistics.median(times[name] for times in measured) for name in files}
