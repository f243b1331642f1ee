"""What Alembic runs: the migrations, on the connection and in the transaction that it was handed."""

from alembic import context

from serving.tenants.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    version_table=context.config.attributes["version_table"],
)
with context.begin_transaction():
    context.run_migrations()
