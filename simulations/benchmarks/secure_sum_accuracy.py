"""``shoal-sim bench secure-sum-accuracy``: what encoding costs a model, in points of accuracy.

Ten devices with a Dirichlet(0.3) share of Fashion-MNIST each train the small CNN, once averaged in
floats and once through 16-bit lanes, from the same weights over the same rows.
"""

import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from shared.errors import ConfigError
from shared.run_plan import TrainingPlan
from shared.tasks.registry import load_task
from simulations.benchmarks.report import Row, row_at_most
from simulations.datasets import load_images
from simulations.partition import dirichlet_partition
from simulations.summed_training import EncodedMean, Fleet, accuracies, plain_mean

Progress = Callable[[str], None]
ROW = "points of accuracy lost to secure sums, 16 bit, no noise"
DEVICES, ROUNDS, LAST = 10, 10, 3
CLIP_NORM = 10.0
_SEEDS = (1, 2, 3, 4, 5)
_PROCESSES = 2


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure the one row there is.

    Args:
        only: its name, or None.
        quick: fewer rounds and seeds.
        progress: is told what is being measured.

    Raises:
        ConfigError: there is no such row.
        DataError: Fashion-MNIST is not on this machine.
    """
    if only not in {None, ROW}:
        raise ConfigError(f"there is no row {only!r}; the only one is {ROW!r}")
    seeds, rounds = (_SEEDS[:2], 4) if quick else (_SEEDS, ROUNDS)
    plain, secure = [], []
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        for seed, (in_floats, in_lanes) in zip(
            seeds, pool.map(_compare, seeds, [rounds] * len(seeds)), strict=True
        ):
            plain.append(statistics.mean(in_floats[-LAST:]))
            secure.append(statistics.mean(in_lanes[-LAST:]))
            progress(f"seed {seed}: {plain[-1]:.2%} in floats, {secure[-1]:.2%} in 16-bit lanes")
    lost = 100 * (statistics.mean(plain) - statistics.mean(secure))
    return [row_at_most(ROW, lost, "points", limit=0.3)]


def _compare(seed: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the accuracies after each round, averaged in floats and in lanes."""
    torch.set_num_threads(1)
    data = load_images(None)
    rng = np.random.default_rng(seed)
    parts = dirichlet_partition(data.train.targets, devices=DEVICES, alpha=0.3, rng=rng)
    task = load_task(data.task(name="images", model="small-cnn"))
    fleet = Fleet(task, [data.train.take(rows) for rows in parts], data.test)
    plan = TrainingPlan(max_batches=40, batch_size=32, learning_rate=0.02, momentum=0.9)
    in_lanes = EncodedMean(lane_bits=16, clip_norm=CLIP_NORM, seed=seed)
    return (
        accuracies(fleet, plan, plain_mean, rounds=rounds, seed=seed),
        accuracies(fleet, plan, in_lanes, rounds=rounds, seed=seed),
    )
