"""Run by Alembic. The connection comes from `Database.migrate`, or from the developer's test."""

from alembic import context

from cloud_coordinator.migrations.tables import METADATA

with context.begin_transaction():
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=METADATA,
        render_as_batch=True,  # SQLite changes a table by copying it
    )
    context.run_migrations()
