"""What compressions have done, and what was built of a version before it is signed.

Revision: 0007
After: 0006
"""

import sqlalchemy as sa
from alembic import op

from cloud_coordinator.database import UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.add_column("model_versions", sa.Column("built", sa.LargeBinary(), nullable=True))
    op.add_column("model_variants", sa.Column("step", sa.Text(), nullable=False, server_default=""))
    op.create_table(
        "compression_steps",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("done_at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"]),
        sa.PrimaryKeyConstraint("run_id", "step"),
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_table("compression_steps")
    op.drop_column("model_variants", "step")
    op.drop_column("model_versions", "built")
