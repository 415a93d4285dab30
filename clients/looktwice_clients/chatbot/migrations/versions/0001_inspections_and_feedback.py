"""Inspections, and the feedback on them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "inspections",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("operator", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("file_name", sa.Text, nullable=False),
        sa.Column("product", sa.Text),
        sa.Column("product_version", sa.Text),
        sa.Column("verdict", sa.String(32), nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("threshold", sa.Double, nullable=False),
        sa.Column("severity", sa.Text, nullable=False),
        sa.Column("p_value", sa.Double),
        sa.Column("regions", sa.JSON, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("expert", sa.Text, nullable=False),
        sa.Column("overlay", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_inspections_owner_created", "inspections", ["owner", "created"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column(
            "inspection_id",
            sa.String(32),
            sa.ForeignKey("inspections.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("operator", sa.Text, nullable=False),
        sa.Column("right", sa.Boolean, nullable=False),
        sa.Column("word", sa.Text, nullable=False),
    )
    op.create_index("ix_feedback_inspection_id", "feedback", ["inspection_id"])


def downgrade() -> None:
    """Drop both tables, with what is in them."""
    op.drop_table("feedback")
    op.drop_table("inspections")
