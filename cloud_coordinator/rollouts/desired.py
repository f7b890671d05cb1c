"""From rollouts and targets to the desired state of one device, inside the caller's transaction."""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_coordinator.rollouts.lifecycle import RolloutState
from cloud_coordinator.rollouts.tables import DesiredRow, RolloutDeviceRow, RolloutRow, TargetRow
from shared.rollout_plan import RolloutPlan, plan_of

_HELD = (RolloutState.ROLLING.value, RolloutState.PAUSED.value)


def resolve(
    session: Session, device_id: str, tasks: Collection[str], *, now: datetime
) -> DesiredRow | None:
    """Bring a device's desired state in line: its rollout's version, else its task's target.

    Returns:
        The row, changed or not; None for a device of which nothing is desired yet.
    """
    row = session.get(DesiredRow, device_id)
    wanted = _of_rollout(session, device_id) or _of_target(session, tasks)
    if wanted is None or (row and (row.model_version, row.watch_s) == wanted):
        return row
    if row is None:
        row = DesiredRow(device_id=device_id, version=0)
        session.add(row)
    row.version += 1
    (row.model_version, row.watch_s), row.set_at = wanted, now
    session.flush()
    return row


def _of_rollout(session: Session, device_id: str) -> tuple[str, float] | None:
    rollout = session.scalars(
        select(RolloutRow)
        .join(RolloutDeviceRow, RolloutDeviceRow.rollout_id == RolloutRow.rollout_id)
        .where(RolloutDeviceRow.device_id == device_id, RolloutRow.state.in_(_HELD))
        .order_by(RolloutRow.created_at.desc())
    ).first()
    if rollout is None:
        return None
    plan: RolloutPlan = plan_of(rollout.plan)
    return rollout.model_version, plan.watch_s


def _of_target(session: Session, tasks: Collection[str]) -> tuple[str, float] | None:
    newest = session.scalars(
        select(TargetRow).where(TargetRow.task_name.in_(tasks)).order_by(TargetRow.set_at.desc())
    ).first()
    return None if newest is None else (newest.model_version, 0.0)
