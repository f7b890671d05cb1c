"""Federated averaging in one process, where the way updates are summed can be exchanged.

For experiments on what encoding and noise cost: devices train with the code that agents run, and
their updates are averaged either as floats or as encoded lanes. Masks are left out, since they
vanish from a sum exactly, bit for bit; everything else is what a secure round does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from edge_agent.training import Teacher, evaluate, train
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.secure_sum.choice import choose_encoding
from shared.secure_sum.config import MAX_ROSTER, LaneBits, Noise, SumConfig
from shared.secure_sum.encoding import decode_sum, encode
from shared.secure_sum.lane_shape import empty_lanes
from shared.tasks.examples import Examples
from shared.tasks.task import Task, seeded_model
from shared.tasks.vectors import to_vector

Floats = NDArray[np.float64]
Average = Callable[[Sequence[Vector], Sequence[int], int], Floats]
_CORRUPT_FRACTION = 0.1
_NAMELESS = "0" * 64  # digest of what plays no part here


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices with their rows, and the rows on which all are measured."""

    task: Task
    devices: Sequence[Examples]
    test: Examples


def accuracies(
    fleet: Fleet, plan: TrainingPlan, average: Average, *, rounds: int, seed: int
) -> list[float]:
    """Train over all devices in every round, and return the accuracy after each round.

    Args:
        fleet: who trains.
        plan: what each device does in a round.
        average: gets updates of shape (d,), numbers of examples and the round's number, and returns
            the mean update.
        rounds: how many.
        seed: decides initial weights and the order of rows, whatever ``average`` does.
    """
    found = []
    for parameters in train_rounds(fleet, plan, average, rounds=rounds, seed=seed):
        sums = evaluate(fleet.task, parameters, fleet.test)
        found.append(fleet.task.summarize(sums)["accuracy"])
    return found


def train_rounds(
    fleet: Fleet,
    plan: TrainingPlan,
    average: Average,
    *,
    rounds: int,
    seed: int,
    teacher: Teacher | None = None,
) -> Iterator[Vector]:
    """Yield the parameters, shape (d,), after each round; arguments are those of `accuracies`.

    ``teacher`` is whom all devices learn from besides.
    """
    parameters = to_vector(seeded_model(fleet.task, seed))
    sizes = [len(rows) for rows in fleet.devices]
    for number in range(1, rounds + 1):
        updates = [
            train(
                fleet.task,
                parameters,
                rows,
                plan,
                seed=seed * 1_000_003 + number * 1009 + place,
                teacher=teacher,
            ).parameters
            - parameters
            for place, rows in enumerate(fleet.devices)
        ]
        parameters = (parameters + average(updates, sizes, number)).astype(np.float32)
        yield parameters


def plain_mean(updates: Sequence[Vector], sizes: Sequence[int], _: int) -> Floats:
    """Average as FedAvg does, weighted by examples, in float64."""
    total = np.zeros(updates[0].shape)
    for update, size in zip(updates, sizes, strict=True):
        total += np.multiply(update, size, dtype=np.float64)
    return total / sum(sizes)


def shards_of(devices: int) -> list[NDArray[np.int64]]:
    """Part devices into as few rosters as hold them, as even as can be."""
    return np.array_split(np.arange(devices), -(-devices // MAX_ROSTER))


@dataclass(frozen=True, slots=True)
class EncodedMean:
    """The mean as secure sums give it: clip, rotate, round, noise, add lanes, decode.

    More devices than one roster holds are several sums, each with noise of its own.
    """

    lane_bits: LaneBits
    clip_norm: float
    seed: int
    noise_multiplier: float = 0.0  # 0: none, and updates are weighted by examples

    def __call__(self, updates: Sequence[Vector], sizes: Sequence[int], number: int) -> Floats:
        """Average the updates of one round."""
        weights = np.ones(len(sizes)) if self.noise_multiplier else np.array(sizes) / max(sizes)
        rng = np.random.default_rng([self.seed, number])
        shards = shards_of(len(updates))
        mean = np.zeros(updates[0].size)
        for shard in shards:
            config = self.config(len(shard), updates[0].size, number)
            total = empty_lanes(config)
            for place in shard:
                weighted = (updates[place] * weights[place]).astype(np.float32)
                lanes = encode(config, weighted, {}, rng=rng, entropy=rng.bytes)
                np.add(total.main, lanes.main, out=total.main)
            mean += decode_sum(config, total, count=len(shard))[0]
        return mean / float(weights.sum())

    def config(self, devices: int, length: int, number: int) -> SumConfig:
        """Return what one sum of so many devices is configured as."""
        rng = np.random.default_rng([self.seed, number, 1])
        noise = None
        if self.noise_multiplier:
            honest = devices - math.ceil(
                _CORRUPT_FRACTION * devices
            )  # only theirs can be counted on
            noise = Noise(multiplier=self.noise_multiplier, survivors=honest)
        encoding = choose_encoding(
            length=length,
            lane_bits=self.lane_bits,
            clip_norm=self.clip_norm,
            max_roster=devices,
            rotate=True,
            noise=noise,
            rotation_seed=rng.bytes(16),
        )
        return SumConfig(
            session=rng.bytes(32),
            fleet="simulation",
            run_id="simulation",
            round_number=number,
            purpose="train",
            task_digest=_NAMELESS,
            question_digest=_NAMELESS,
            base_digest=_NAMELESS,
            min_survivors=devices,
            corrupt_fraction=_CORRUPT_FRACTION,
            max_roster=devices,
            encoding=encoding,
            noise=noise,
            server_key=bytes(32),
            membership_version=1,
            expires_at=datetime.max.replace(tzinfo=UTC),
        )
