"""The ledger: what each data set gave away, charged in full before a vector leaves (R8 to R10).

Unit: this device's whole contribution to a data set, added or removed. A noised sum costs its Rényi
curve, and every participation counts in full: the coordinator chooses who takes part, so nothing is
saved by chance. An exact sum has no ε; it is counted, and capped for each version of the data.
There are no refunds: a charge is written in the step before the vector is handed out. Noise that
only the coordinator promises to add is no noise here.

Rényi differential privacy: Mironov, "Rényi Differential Privacy", CSF 2017; curves add up.
"""

import sqlite3
from datetime import datetime
from typing import Literal

import msgspec

from edge_agent.privacy.policy import OwnerPolicy
from edge_agent.privacy.sources import DataUse
from shared.errors import PolicyError
from shared.secure_sum.accounting import RdpCurve
from shared.secure_sum.config import Purpose

Kind = Literal["noised", "exact", "plain"]  # plain: the update itself, in no sum
_ROUNDING = 1e-9  # relative; a budget may be spent to its end


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """What one participation costs."""

    session: bytes | None  # None: it was no secure sum
    run_id: str
    round_number: int
    purpose: Purpose
    kind: Kind
    curve: RdpCurve | None  # of the noise that this device enforces; None where there is none


def check_affordable(
    connection: sqlite3.Connection, policy: OwnerPolicy, data: DataUse, charge: Charge
) -> None:
    """Raise PolicyError unless the owner's budget bears one more ``charge``."""
    if charge.curve is None:
        count = _exact_count(connection, data)
        if count >= policy.max_exact_sums:
            raise PolicyError(
                f"this device's owner has max_exact_sums = {policy.max_exact_sums} in policy.toml, "
                "and as many were made of this version of the data"
            )
        return
    spent = curve_spent(connection, data.data_id, data.part)
    epsilon = (spent + charge.curve).epsilon(policy.delta)
    if not epsilon <= policy.epsilon * (1 + _ROUNDING):
        raise PolicyError(
            f"this device's owner has epsilon = {policy.epsilon:g} at delta = {policy.delta:g} in "
            f"policy.toml, and with this sum {epsilon:.4g} would be spent"
        )


def book(connection: sqlite3.Connection, data: DataUse, charge: Charge, now: datetime) -> None:
    """Charge a participation, in full."""
    connection.execute(
        "INSERT INTO charges (session, data_id, part, digest, kind, curve, run_id, round_number, "
        "purpose, charged_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            charge.session,
            data.data_id,
            data.part,
            data.digest,
            charge.kind,
            None if charge.curve is None else msgspec.json.encode(charge.curve).decode(),
            charge.run_id,
            charge.round_number,
            charge.purpose,
            now.timestamp(),
        ),
    )


def reset(connection: sqlite3.Connection, data_id: str, now: datetime) -> int:
    """Begin the account of a data set anew, as its owner wishes; returns how many charges end.

    What is spent stays spent: the owner forgives what was given away, not that a question may be
    asked twice.
    """
    cursor = connection.execute(
        "UPDATE charges SET reset_at = ? WHERE data_id = ? AND reset_at IS NULL",
        (now.timestamp(), data_id),
    )
    return cursor.rowcount


def curve_spent(connection: sqlite3.Connection, data_id: str, part: str) -> RdpCurve:
    """Return the sum of all noised charges that count."""
    rows = connection.execute(
        # Most sums of a run cost the same: few different curves, however many charges.
        "SELECT curve, COUNT(*) FROM charges WHERE data_id = ? AND part = ? "
        "AND reset_at IS NULL AND curve IS NOT NULL GROUP BY curve",
        (data_id, part),
    )
    total = RdpCurve.nothing()
    for curve, count in rows:
        total += msgspec.json.decode(curve, type=RdpCurve).times(count)
    return total


def _exact_count(connection: sqlite3.Connection, data: DataUse) -> int:
    (count,) = connection.execute(
        "SELECT COUNT(*) FROM charges WHERE data_id = ? AND part = ? AND digest = ? "
        "AND curve IS NULL AND reset_at IS NULL",
        (data.data_id, data.part, data.digest),
    ).fetchone()
    return int(count)
