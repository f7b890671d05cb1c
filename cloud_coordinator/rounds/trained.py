"""What a cohort made of a round: the mean of its devices' parameters, however it came about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloud_coordinator.rounds.aggregation import ModelState
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.worker_messages import Participation, RoundStarted, Secrecy

Groups = Mapping[int, Sequence[str]]  # devices that are summed together, by the group's number


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One round's training, whether or not it may be committed.

    Attributes:
        count: devices whose updates are in the mean.
        mean: shape (d,), of the devices' parameters; None where there is none.
        sums: the devices' training statistics, added.
        participations: each device's part.
        cause: why there is no mean, or why a group is not in it.
        memory: vectors to be kept with the model's state for the next round.
        secrecy: None where each update was seen.
    """

    count: int
    mean: NDArray[np.float64] | None = None
    sums: Mapping[str, float] = field(default_factory=dict)
    participations: tuple[Participation, ...] = ()
    cause: str = ""
    memory: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    secrecy: Secrecy | None = None


class Training(Protocol):
    """Has cohorts train, for the rounds of one run."""

    def eligible(self, joined: frozenset[str]) -> frozenset[str]:
        """Return those of the devices that are there who may be asked."""
        ...

    def why_not_enough(self) -> str:
        """Return why those who are there can never be enough any more; empty if they may be."""
        ...

    def select(
        self,
        devices: frozenset[str],
        *,
        rng: np.random.Generator,
        times_selected: Mapping[str, int],
    ) -> Groups:
        """Draw the devices of one round."""
        ...

    def resume(
        self, round_number: int, state: ModelState, *, on_masked: Callable[[], None]
    ) -> Trained | None:
        """Finish what an earlier life of the worker began; None where it left nothing."""
        ...

    def train(
        self,
        round_number: int,
        groups: Groups,
        state: ModelState,
        *,
        on_masked: Callable[[], None],
    ) -> Trained:
        """Have devices train; ``on_masked`` is called once no masked update is added any more."""
        ...


def say_started(host: RunHost, round_number: int, cohort: Sequence[str]) -> None:
    """Tell whom a round asked, and until when they may answer."""
    deadline = timedelta(seconds=host.plan.cohort.round_deadline_s)
    host.report(
        RoundStarted(
            round_number=round_number, cohort=tuple(cohort), deadline_at=host.now() + deadline
        )
    )
