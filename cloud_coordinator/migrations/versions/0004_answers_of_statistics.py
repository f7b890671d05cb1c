"""What a run that asks for statistics was answered.

Revision: 0004
After: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.add_column("rounds", sa.Column("answers", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("rounds", "answers")
