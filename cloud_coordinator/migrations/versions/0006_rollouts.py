"""Rollouts in waves, and how devices do with what they serve.

Revision: 0006
After: 0005
"""

import sqlalchemy as sa
from alembic import op

from cloud_coordinator.database import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def _moment(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, UtcDateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "rollouts",
        sa.Column("rollout_id", sa.String(32), primary_key=True),
        sa.Column("task_name", sa.String(63), nullable=False, index=True),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("previous_version", sa.String(64), nullable=True),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("gate", sa.String(32), nullable=False),
        sa.Column("wave_number", sa.Integer(), nullable=False),
        _moment("created_at"),
        _moment("ended_at", nullable=True),
        sa.Column("active_task", sa.String(63), nullable=True, unique=True),
    )
    op.create_table(
        "rollout_devices",
        sa.Column(
            "rollout_id", sa.String(32), sa.ForeignKey("rollouts.rollout_id"), primary_key=True
        ),
        sa.Column("device_id", sa.String(63), sa.ForeignKey("devices.device_id"), primary_key=True),
        sa.Column("wave_number", sa.Integer(), nullable=False),
        sa.Column("told_version", sa.Integer(), nullable=False),
        _moment("told_at"),
        _moment("serving_since", nullable=True),
    )
    op.add_column(
        "desired_states", sa.Column("watch_s", sa.Double(), nullable=False, server_default="0")
    )
    op.add_column("devices", sa.Column("health", sa.JSON(), nullable=True))
    op.add_column("devices", _moment("health_sent_at", nullable=True))


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("devices", "health_sent_at")
    op.drop_column("devices", "health")
    op.drop_column("desired_states", "watch_s")
    op.drop_table("rollout_devices")
    op.drop_table("rollouts")
