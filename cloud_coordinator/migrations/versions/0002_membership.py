"""The signed membership list, and whose a device is.

Revision: 0002
After: 0001
"""

import sqlalchemy as sa
from alembic import op

from cloud_coordinator.database import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "membership_lists",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("issued_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_membership_lists")),
    )
    # Added one by one: a batch would copy the table, and the rows that point to it forbid that.
    op.add_column(
        "join_tokens", sa.Column("owner", sa.String(length=128), server_default="", nullable=False)
    )
    op.add_column(
        "devices", sa.Column("owner", sa.String(length=128), server_default="", nullable=False)
    )
    op.add_column("devices", sa.Column("revoked_at", UtcDateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Take this revision back."""
    op.drop_column("devices", "revoked_at")
    op.drop_column("devices", "owner")
    op.drop_column("join_tokens", "owner")
    op.drop_table("membership_lists")
