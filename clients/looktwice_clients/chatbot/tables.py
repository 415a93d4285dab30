"""The chatbot's two tables: inspections with their overlays, and what operators say of them.

`migrations/` makes them; `tests/clients/chatbot/test_history.py` holds the two to each other.
"""

import secrets
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, Index, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, in UTC; SQLite forgets the zone, PostgreSQL gives the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The same moment in UTC, which is what a time without a zone was written in."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def new_id() -> str:
    """32 hexadecimal digits that nobody can guess."""
    return secrets.token_hex(16)


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


class Table(DeclarativeBase):
    """What all tables share."""


class InspectionRow(Table):
    """One inspection as its operator saw it."""

    __tablename__ = "inspections"
    __table_args__ = (Index("ix_inspections_owner_created", "owner", "created"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    owner: Mapped[str] = mapped_column(String(64))
    """The browser that asked, by its cookie; nobody else is shown the row."""
    operator: Mapped[str] = mapped_column(Text)
    """The name typed at the login; "" where there is none."""
    created: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    file_name: Mapped[str] = mapped_column(Text)
    product: Mapped[str | None] = mapped_column(Text)
    product_version: Mapped[str | None] = mapped_column(Text)
    verdict: Mapped[str] = mapped_column(String(32))
    score: Mapped[float]
    threshold: Mapped[float]
    severity: Mapped[str] = mapped_column(Text)
    p_value: Mapped[float | None]
    regions: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """As on the wire, highest score first."""
    width: Mapped[int]
    height: Mapped[int]
    model: Mapped[str] = mapped_column(Text)
    expert: Mapped[str] = mapped_column(Text)
    overlay: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    """The overlay picture as JPEG."""


class FeedbackRow(Table):
    """What an operator says of an inspection; the latest one counts."""

    __tablename__ = "feedback"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    inspection_id: Mapped[str] = mapped_column(
        ForeignKey("inspections.id", ondelete="CASCADE"), index=True
    )
    created: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    operator: Mapped[str] = mapped_column(Text)
    right: Mapped[bool]
    """Whether the verdict was right."""
    word: Mapped[str] = mapped_column(Text)
    """In the operator's own words: what it really is."""
