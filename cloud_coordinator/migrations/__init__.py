"""Alembic's folder: how the schema of one version becomes that of the next."""
