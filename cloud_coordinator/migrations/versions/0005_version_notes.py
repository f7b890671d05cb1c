"""What people note about model versions.

Revision: 0005
After: 0004
"""

import sqlalchemy as sa
from alembic import op

from cloud_coordinator.database import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "version_notes",
        sa.Column("note_id", sa.Integer(), primary_key=True),
        sa.Column(
            "run_id",
            sa.String(128),
            sa.ForeignKey("model_versions.run_id"),
            nullable=False,
            index=True,
        ),
        sa.Column("written_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(63), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_table("version_notes")
