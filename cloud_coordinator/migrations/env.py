"""Run by Alembic. The connection comes from `Database.migrate`, or from a developer's script."""

from alembic import context

from cloud_coordinator.migrations.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    user_module_prefix="",  # scripts import UtcDateTime by name
    render_as_batch=True,  # SQLite changes a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
