"""How much accuracy privacy costs: ε against accuracy for 100 and for 1,000 devices in a sum.

Question: what accuracy does a linear model reach on Fashion-MNIST when every round's sum carries
distributed Skellam noise, and what has a device spent that took part in every round?

    python -m simulations.epsilon_accuracy --out docs/images/epsilon-accuracy.png

Every device takes part in every round, so ε holds without amplification by sampling, as the
device's own ledger books it (unit: all that one device holds). The result is a table in
docs/benchmarks.md and the plot.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from torch import nn

from shared.run_plan import TrainingPlan
from shared.secure_sum.accounting import charge_of
from shared.tasks.image_classification import ImageClassification
from simulations.datasets import load_images
from simulations.summed_training import (
    EncodedMean,
    Fleet,
    accuracies,
    plain_mean,
    shards_of,
)

DELTA = 1e-6
ROUNDS = 20
MULTIPLIERS = (16.0, 8.0, 4.0, 2.0, 1.0)
CLIP_NORM = 0.5
IMAGES = 60_000  # in all
_PROCESSES = 2


class _Linear(ImageClassification):
    """Softmax regression on raw pixels: 7,850 parameters, so that noise has little to hide in."""

    def build_model(self) -> nn.Module:
        pixels = int(np.prod(self._shape))
        layer = nn.Linear(pixels, len(self.labels))
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(nn.Flatten(), _Scaling(), layer)


class _Scaling(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * (1 / 255)


@dataclass(frozen=True, slots=True)
class Point:
    """One training: so many devices, so much noise in each sum."""

    devices: int
    noise_multiplier: float  # 0: plain FedAvg
    epsilon: float  # of one device in all rounds, at δ = 1e-6; infinite without noise
    accuracy: float  # mean of the last three rounds


def measure(devices: int, noise_multiplier: float, *, rounds: int = ROUNDS, seed: int = 1) -> Point:
    """Train once."""
    torch.set_num_threads(1)
    data = load_images(None)
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(data.train)), devices)
    options = data.task(name="images", model="small-cnn").options
    task = _Linear.from_options({**options, "loss": "cross-entropy"})
    fleet = Fleet(task, [data.train.take(rows) for rows in parts], data.test)
    plan = TrainingPlan(epochs=1, batch_size=20, learning_rate=0.05, momentum=0.0)
    if not noise_multiplier:
        found = accuracies(fleet, plan, plain_mean, rounds=rounds, seed=seed)
        return Point(devices, 0.0, float("inf"), statistics.mean(found[-3:]))
    noised = EncodedMean(
        lane_bits=32, clip_norm=CLIP_NORM, seed=seed, noise_multiplier=noise_multiplier
    )
    found = accuracies(fleet, plan, noised, rounds=rounds, seed=seed)
    # Each shard's sum has noise of its own, and a device is in one shard.
    charge = charge_of(noised.config(min(map(len, shards_of(devices))), 7850, 1))
    spent = charge
    for _ in range(rounds - 1):
        spent = spent + charge
    return Point(devices, noise_multiplier, spent.epsilon(DELTA), statistics.mean(found[-3:]))


def draw(points: Sequence[Point], path: Path) -> None:
    """Plot accuracy against ε, a line for each number of devices."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the backend is chosen)

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for devices in sorted({point.devices for point in points}):
        noised = sorted(
            (p for p in points if p.devices == devices and p.noise_multiplier),
            key=lambda p: p.epsilon,
        )
        (line,) = axes.plot(
            [p.epsilon for p in noised],
            [100 * p.accuracy for p in noised],
            marker="o",
            label=f"{devices:,} devices of {IMAGES // devices} images",
        )
        for plain in (p for p in points if p.devices == devices and not p.noise_multiplier):
            axes.axhline(
                100 * plain.accuracy,
                color=line.get_color(),
                linestyle=":",
                label="the same, no noise",
            )
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel(
        f"ε of a device in all {ROUNDS} rounds (δ = {DELTA:g}; smaller is more private)"
    )
    axes.set_ylabel("accuracy on test images, %")
    axes.set_title("Fashion-MNIST, linear model, distributed Skellam noise")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all points, print them as CSV and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/epsilon-accuracy.png"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    asked = [(devices, z) for devices in (100, 1000) for z in (0.0, *MULTIPLIERS)]
    points = []
    table = csv.writer(sys.stdout)
    table.writerow(["devices", "noise_multiplier", "epsilon", "accuracy"])
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, *what, rounds=options.rounds) for what in asked]
        for future in futures:
            point = future.result()
            points.append(point)
            table.writerow(
                [
                    point.devices,
                    f"{point.noise_multiplier:g}",
                    f"{point.epsilon:.3g}",
                    f"{point.accuracy:.4f}",
                ]
            )
            sys.stdout.flush()
    draw(points, options.out)


if __name__ == "__main__":
    main()
