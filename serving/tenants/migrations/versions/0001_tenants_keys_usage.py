"""Tenants, their keys, what they used, and how far each source of usage was counted."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "spanfill_tenants",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("weight", sa.Double(), nullable=False),
        *_limits(),
        sa.Column("models", sa.JSON(none_as_null=True)),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Double()),
    )
    op.create_table(
        "spanfill_keys",
        sa.Column("public_id", sa.String(), primary_key=True),
        sa.Column("tenant", sa.String(), sa.ForeignKey("spanfill_tenants.name"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("secret_hash", sa.String(), nullable=False),
        sa.Column("previous_hash", sa.String()),
        sa.Column("previous_until", sa.Double()),
        *_limits(),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double()),
        sa.Column("revoked", sa.Double()),
        sa.Column("last_used", sa.Double()),
    )
    op.create_table(
        "spanfill_usage",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True),
        sa.Column("model", sa.String(), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("job", sa.String(), primary_key=True),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "spanfill_usage_sources",
        sa.Column("source", sa.String(), primary_key=True),
        sa.Column("latest", sa.BigInteger(), nullable=False),
    )


def _limits() -> list[sa.Column[int]]:
    names = ("tokens_per_minute", "requests_per_minute", "max_concurrency")
    return [sa.Column(name, sa.BigInteger()) for name in names]
