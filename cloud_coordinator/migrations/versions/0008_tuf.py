"""Signed TUF metadata, and the files that they list.

Revision: 0008
After: 0007
"""

import sqlalchemy as sa
from alembic import op

from cloud_coordinator.database import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "tuf_metadata",
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("replaced_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("role", "version", name=op.f("pk_tuf_metadata")),
    )
    op.create_table(
        "tuf_targets",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("path", sa.String(200), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "path", name=op.f("pk_tuf_targets")),
    )
    op.create_index(op.f("ix_tuf_targets_role"), "tuf_targets", ["role"])


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_table("tuf_targets")
    op.drop_table("tuf_metadata")
