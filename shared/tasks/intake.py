"""What reading a data source gave: the usable examples, and why other rows were left out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.tasks.examples import Examples

_REASONS_SHOWN = 5
_LABELS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Intake:
    """A source that fits its contract."""

    examples: Examples
    skipped: Mapping[str, int]  # rows left out, by reason


def not_a_label(labels: Sequence[str]) -> str:
    """Say why a row with another label is left out, so that a misspelt list of labels is seen."""
    shown = ", ".join(map(repr, labels[:_LABELS_SHOWN]))
    more = len(labels) - _LABELS_SHOWN
    return f"label is none of {shown}" + (f" and {more} others" if more > 0 else "")


class SkippedRows:
    """Counts the rows that break the contract, by reason, and remembers the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, where: str, rows: int = 1) -> None:
        """Count ``rows`` rows; ``where`` says in the source's own words which is the first."""
        self.counts[reason] += rows
        self._first.setdefault(reason, where)

    def keep(
        self, checks: Iterable[tuple[str, NDArray[np.bool_]]], *, unit: str
    ) -> NDArray[np.bool_]:
        """Apply checks (reason, mask of bad rows) in order; return the mask of rows to keep."""
        kept: NDArray[Any] | None = None
        for reason, bad in checks:
            kept = np.ones(len(bad), np.bool_) if kept is None else kept
            fresh = np.flatnonzero(bad & kept)
            if len(fresh):
                self.add(reason, f"{unit} {fresh[0]}", len(fresh))
            kept &= ~bad
        assert kept is not None
        return kept

    def __str__(self) -> str:
        listed = [
            f"{count} x {reason} (first: {self._first[reason]})"
            for reason, count in self.counts.most_common(_REASONS_SHOWN)
        ]
        if more := len(self.counts) - len(listed):
            listed.append(f"{more} other reasons")
        return "; ".join(listed)
