"""Receipts: what each data set gave away, for the owner to read."""

import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import get_args

import msgspec

from edge_agent.privacy.ledger import Kind, curve_spent
from edge_agent.privacy.policy import OwnerPolicy
from edge_agent.privacy.sources import Part

_WHAT = {
    "noised": ("sum with noise", "sums with noise"),
    "exact": ("exact sum", "exact sums"),
    "plain": ("contribution in no sum", "contributions in no sum"),
}
_PURPOSE = {"train": "training", "evaluate": "evaluation", "statistics": "statistics"}


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """All contributions of one kind to one run."""

    run_id: str
    purpose: str
    kind: Kind
    contributions: int
    first_round: int
    last_round: int
    last_at: datetime


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One account: one part of one data set."""

    data_id: str
    name: str
    path: str
    part: Part
    noised: int  # contributions since the owner's last reset, by kind
    exact: int
    plain: int
    epsilon: float | None  # spent at delta; None: no ε claim holds
    noised_epsilon: float  # of the noised sums alone
    epsilon_budget: float
    delta: float
    reset_at: datetime | None  # when the owner last began the account anew
    uses: tuple[Use, ...]  # since then, newest last


def read_receipts(connection: sqlite3.Connection, policy: OwnerPolicy) -> Sequence[Receipt]:
    """Return all accounts, by name; such as gave nothing away included."""
    sources = connection.execute("SELECT data_id, name, path FROM sources ORDER BY name").fetchall()
    return [
        _receipt(connection, policy, data_id=data_id, name=name, path=path, part=part)
        for data_id, name, path in sources
        for part in get_args(Part)
    ]


def describe(receipt: Receipt) -> str:
    """Say in plain words what one account gave away."""
    rows = "training rows" if receipt.part == "train" else "held-out rows"
    lines = [f"{receipt.name}, {rows} ({receipt.path or 'in no file'})"]
    if not receipt.uses:
        lines.append("  gave nothing away")
    lines += [f"  {_sentence(use)}" for use in receipt.uses]
    if receipt.noised:
        lines.append(
            f"  noised sums spent ε = {receipt.noised_epsilon:.3g} of {receipt.epsilon_budget:g} "
            f"at δ = {receipt.delta:g}"
        )
    if count := receipt.exact + receipt.plain:
        times = "once" if count == 1 else f"{count:,} times"
        lines.append(f"  contributed exactly {times}: no ε claim holds for these data")
    if receipt.reset_at:
        lines.append(f"  counted since you began anew, {receipt.reset_at:%Y-%m-%d %H:%M} UTC")
    return "\n".join(lines)


def _sentence(use: Use) -> str:
    one, many = _WHAT[use.kind]
    what = f"{use.contributions:,} {one if use.contributions == 1 else many}"
    if use.first_round == use.last_round:
        rounds = f"round {use.first_round}"
    else:
        rounds = f"rounds {use.first_round} to {use.last_round}"
    return (
        f"{what} for {_PURPOSE[use.purpose]} in run {use.run_id}, {rounds}, "
        f"last on {use.last_at:%Y-%m-%d %H:%M} UTC"
    )


def _receipt(
    connection: sqlite3.Connection,
    policy: OwnerPolicy,
    *,
    data_id: str,
    name: str,
    path: str,
    part: Part,
) -> Receipt:
    uses = _uses(connection, data_id, part)
    counts = dict.fromkeys(get_args(Kind), 0)
    for use in uses:
        counts[use.kind] += use.contributions
    epsilon = curve_spent(connection, data_id, part).epsilon(policy.delta) if uses else 0.0
    (reset_at,) = connection.execute(
        "SELECT MAX(reset_at) FROM charges WHERE data_id = ? AND part = ?", (data_id, part)
    ).fetchone()
    return Receipt(
        data_id=data_id,
        name=name,
        path=path,
        part=part,
        noised=counts["noised"],
        exact=counts["exact"],
        plain=counts["plain"],
        epsilon=None if counts["exact"] or counts["plain"] else epsilon,
        noised_epsilon=epsilon if counts["noised"] else 0.0,
        epsilon_budget=policy.epsilon,
        delta=policy.delta,
        reset_at=None if reset_at is None else datetime.fromtimestamp(reset_at, UTC),
        uses=uses,
    )


def _uses(connection: sqlite3.Connection, data_id: str, part: Part) -> tuple[Use, ...]:
    rows = connection.execute(
        "SELECT run_id, purpose, kind, COUNT(*), MIN(round_number), MAX(round_number), "
        "MAX(charged_at) AS last_at FROM charges WHERE data_id = ? AND part = ? "
        "AND reset_at IS NULL GROUP BY run_id, purpose, kind ORDER BY last_at, purpose, kind",
        (data_id, part),
    )
    return tuple(
        Use(
            run_id=run_id,
            purpose=purpose,
            kind=kind,
            contributions=count,
            first_round=first,
            last_round=last,
            last_at=datetime.fromtimestamp(last_at, UTC),
        )
        for run_id, purpose, kind, count, first, last, last_at in rows
    )
