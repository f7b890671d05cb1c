"""What was built of a version before it is signed, and how its static int8 was calibrated.

Revision: 0007
After: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.add_column("model_versions", sa.Column("built", sa.LargeBinary(), nullable=True))
    op.add_column("model_variants", sa.Column("step", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("model_variants", "step")
    op.drop_column("model_versions", "built")
