"""What devices found when they judged a version, and what its files cost each of them.

Revision: 0009
After: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    with op.batch_alter_table("model_versions") as batch:
        batch.add_column(sa.Column("judgement", sa.LargeBinary(), nullable=True))
    with op.batch_alter_table("participations") as batch:
        batch.add_column(sa.Column("facts", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Go back to the revision before."""
    with op.batch_alter_table("participations") as batch:
        batch.drop_column("facts")
    with op.batch_alter_table("model_versions") as batch:
        batch.drop_column("judgement")
