"""Alembic's entry: runs the migrations on the connection that `database.py` hands over."""

from alembic import context

from looktwice_clients.chatbot.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
with context.begin_transaction():
    context.run_migrations()
