"""Rows of a benchmark, as a table for people and as one JSON object for programs."""

from collections.abc import Sequence

import msgspec
from rich.table import Table


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. ``value`` and ``reference`` are in ``unit``."""

    name: str  # fixed, and listed in the docs
    value: float
    unit: str
    reference: float | None  # the same measured elsewhere; None where there is nothing to compare
    ratio: float | None  # the advantage over the reference; above 1 is better
    target: str  # in words, such as "<= 0.1 s"; empty where there is none
    ok: bool | None  # whether the target is met; None where there is none


class _Report(msgspec.Struct, frozen=True):
    bench: str
    machine: str
    rows: Sequence[Row]


def row_at_most(
    name: str,
    value: float,
    unit: str,
    *,
    limit: float,
    reference: float | None = None,
    target: str | None = None,
) -> Row:
    """Make the row of a measurement where less is better and ``limit`` is the target.

    Args:
        name: of the row.
        value: what was measured.
        unit: of value, limit and reference.
        limit: the most that meets the target.
        reference: the same measured elsewhere.
        target: words for the limit where it depends on the reference.
    """
    return Row(
        name=name,
        value=round(value, 4),
        unit=unit,
        reference=None if reference is None else round(reference, 4),
        ratio=None if reference is None else round(reference / max(value, 1e-9), 2),
        target=target or f"<= {limit:g} {unit}",
        ok=value <= limit,
    )


def row_at_least(
    name: str,
    value: float,
    unit: str,
    *,
    reference: float,
    least: float,
    more_is_better: bool = False,
) -> Row:
    """Make the row of a measurement whose advantage over the reference is the target.

    Args:
        name: of the row.
        value: what was measured.
        unit: of value and reference.
        reference: the same measured elsewhere.
        least: the smallest advantage that meets the target.
        more_is_better: as with a rate; else less is, as with a time.
    """
    ratio = value / reference if more_is_better else reference / max(value, 1e-12)
    return Row(
        name=name,
        value=round(value, 6),
        unit=unit,
        reference=round(reference, 6),
        ratio=round(ratio, 2),
        target=f">= {least:g} x",
        ok=ratio >= least,
    )


def as_json(name: str, machine: str, rows: Sequence[Row]) -> str:
    """Return the one JSON object that goes to standard output."""
    return msgspec.json.encode(_Report(name, machine, rows)).decode()


def as_table(name: str, rows: Sequence[Row]) -> Table:
    """Return a table for the terminal."""
    table = Table(title=f"shoal-sim bench {name}")
    for heading, justify in (
        ("row", "left"),
        ("value", "right"),
        ("reference", "right"),
        ("advantage", "right"),
        ("target", "right"),
        ("met", "center"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich's literals
    for row in rows:
        table.add_row(
            row.name,
            f"{row.value:.3g} {row.unit}",
            "" if row.reference is None else f"{row.reference:.3g} {row.unit}",
            "" if row.ratio is None else f"{row.ratio:.3g} x",
            row.target,
            {True: "yes", False: "NO", None: ""}[row.ok],
        )
    return table
