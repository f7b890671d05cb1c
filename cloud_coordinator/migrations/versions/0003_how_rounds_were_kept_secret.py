"""How each round's updates were kept secret.

Revision: 0003
After: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.add_column("rounds", sa.Column("secrecy", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("rounds", "secrecy")
