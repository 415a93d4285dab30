"""The history: inspections and feedback in, each operator's own out again, as pages or as CSV.

While a database on another machine is away, rows wait in a SQLite file beside the chatbot and
move over when it is back; so that they survive the chatbot's own end too.
"""

import csv
import io
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, Select, delete, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, undefer

from looktwice_clients.chatbot.database import cause, connect, upgrade
from looktwice_clients.chatbot.tables import FeedbackRow, InspectionRow, Table
from looktwice_clients.errors import DatabaseError
from looktwice_clients.spreadsheet import cell

log = logging.getLogger(__name__)

PAGE = 10
"""Inspections on one page of the history."""

CSV_COLUMNS = (
    *("created", "operator", "file", "product", "product_version", "verdict", "score"),
    *("threshold", "severity", "p_value", "regions", "places", "width", "height", "model"),
    *("expert", "feedback", "word", "id"),
)


@dataclass(frozen=True)
class Entry:
    """One inspection of the history, and the latest feedback on it."""

    inspection: InspectionRow
    feedback: FeedbackRow | None


class History:
    """Every operator's inspections; safe to share between threads."""

    def __init__(self, url: URL, folder: Path) -> None:
        """Open the database and bring its tables up to date.

        Args:
            url: where the history is kept.
            folder: where rows wait while a database on another machine is away.

        Raises:
            DatabaseError: it cannot be reached, or is newer than this program.
        """
        self._engine = connect(url)
        upgrade(self._engine)
        self._waiting: Engine | None = None
        self._moving = threading.Lock()
        self._refused: set[str] = set()  # of what waits; tried again at the next start
        if url.get_backend_name() != "sqlite":
            self._waiting = connect(URL.create("sqlite", database=str(folder / "waiting.sqlite")))
            upgrade(self._waiting)

    def save(self, inspection: InspectionRow, feedback: FeedbackRow | None = None) -> bool:
        """Keep an inspection and what is said of it; both may be kept already.

        Returns:
            True where it is in the database; False where it waits for the database to come back.

        Raises:
            DatabaseError: it is kept nowhere: no database can be written, or this one refuses it.
        """
        rows = [inspection] if feedback is None else [inspection, feedback]
        try:
            _merge(self._engine, rows)
            return True
        except SQLAlchemyError as error:
            if self._waiting is None or isinstance(error, DataError):  # waiting would not help
                raise DatabaseError(cause(error)) from None
            log.warning("the database is away, what is new waits: %s", cause(error))
        try:
            with self._moving:
                _merge(self._waiting, rows)
        except SQLAlchemyError as error:
            raise DatabaseError(cause(error)) from None
        return False

    def waiting(self) -> int:
        """How many inspections and feedbacks wait for the database to come back.

        What it has refused waits for nothing: the log told it.

        Raises:
            DatabaseError: the file in which they wait cannot be read.
        """
        if self._waiting is None:
            return 0
        refused = self._refused.copy()  # the moving thread adds to it
        counts = [
            select(func.count()).where(of_inspection.not_in(refused))
            for of_inspection in (InspectionRow.id, FeedbackRow.inspection_id)
        ]
        try:
            with Session(self._waiting) as session:
                return sum(session.scalar(count) or 0 for count in counts)
        except SQLAlchemyError as error:
            raise DatabaseError(cause(error)) from None

    def move_waiting(self) -> int:
        """Move what waits into the database; how much was moved, 0 while the database is away."""
        moved = 0
        if self._waiting is None or not self.waiting():
            return moved
        with self._moving, Session(self._waiting) as session:
            for inspection_id in session.scalars(select(InspectionRow.id)).all():
                if inspection_id in self._refused:
                    continue
                on_it = FeedbackRow.inspection_id == inspection_id
                said = session.scalars(select(FeedbackRow).where(on_it)).all()
                row = session.get(InspectionRow, inspection_id, options=[undefer("*")])
                if row is None:
                    continue  # another chatbot with the same folder has moved it
                try:
                    _merge(self._engine, [row, *said])
                except DataError as error:  # of this one alone: the others need not wait for it
                    self._refused.add(inspection_id)
                    log.error("inspection %s stays in the file: %s", inspection_id, cause(error))
                    continue
                except SQLAlchemyError as error:
                    log.warning("%d entries still wait: %s", self.waiting(), cause(error))
                    break
                # These alone: another chatbot with the same folder may have written more meanwhile.
                ids = [feedback.id for feedback in said]
                session.execute(delete(FeedbackRow).where(FeedbackRow.id.in_(ids)))
                spoken_of = select(FeedbackRow).where(on_it).exists()
                of_it = InspectionRow.id == inspection_id
                session.execute(delete(InspectionRow).where(of_it, ~spoken_of))
                session.commit()
                moved += 1 + len(ids)
        return moved

    def page(self, owner: str, number: int = 0) -> tuple[list[Entry], int]:
        """One page of an owner's inspections, newest first, and how many there are in all.

        Raises:
            DatabaseError: the database is away.
        """
        try:
            with Session(self._engine, expire_on_commit=False) as session:
                total = select(func.count()).where(InspectionRow.owner == owner)
                page = _newest_of(owner).offset(number * PAGE).limit(PAGE)
                return _entries(session, page), session.scalar(total) or 0
        except SQLAlchemyError as error:
            raise DatabaseError(cause(error)) from None

    def overlay(self, owner: str, inspection_id: str) -> bytes | None:
        """The overlay picture of one of the owner's inspections, as JPEG; None if it is not theirs.

        Raises:
            DatabaseError: the database is away.
        """
        try:
            with Session(self._engine) as session:
                return session.scalar(
                    select(InspectionRow.overlay).where(
                        InspectionRow.id == inspection_id, InspectionRow.owner == owner
                    )
                )
        except SQLAlchemyError as error:
            raise DatabaseError(cause(error)) from None

    def as_csv(self, owner: str) -> str:
        """All of an owner's inspections, newest first: a line each below `CSV_COLUMNS`.

        Raises:
            DatabaseError: the database is away.
        """
        lines = io.StringIO(newline="")
        writer = csv.writer(lines)
        writer.writerow(CSV_COLUMNS)
        try:
            with Session(self._engine) as session:
                for entry in _entries(session, _newest_of(owner)):
                    writer.writerow(map(cell, _csv_fields(entry)))
        except SQLAlchemyError as error:
            raise DatabaseError(cause(error)) from None
        return lines.getvalue()

    def close(self) -> None:
        """Close the connections."""
        for engine in filter(None, (self._engine, self._waiting)):
            engine.dispose()


def _merge(engine: Engine, rows: Sequence[Table]) -> None:
    """Write the rows, or change those that are there already."""
    try:
        _merge_once(engine, rows)
    except IntegrityError:  # another thread wrote one of them between our look and our write
        _merge_once(engine, rows)


def _merge_once(engine: Engine, rows: Sequence[Table]) -> None:
    with Session(engine) as session, session.begin():
        for row in rows:
            session.merge(row)
            session.flush()


def _newest_of(owner: str) -> Select[InspectionRow]:
    mine = select(InspectionRow).where(InspectionRow.owner == owner)
    return mine.order_by(InspectionRow.created.desc(), InspectionRow.id)


def _entries(session: Session, chosen: Select[InspectionRow]) -> list[Entry]:
    """The chosen inspections with the latest feedback on each."""
    ids = chosen.with_only_columns(InspectionRow.id).subquery()
    said = select(FeedbackRow).where(FeedbackRow.inspection_id.in_(select(ids)))
    latest = {row.inspection_id: row for row in session.scalars(said.order_by(FeedbackRow.created))}
    return [Entry(row, latest.get(row.id)) for row in session.scalars(chosen)]


def _csv_fields(entry: Entry) -> Iterator[object]:
    row, feedback = entry.inspection, entry.feedback
    yield from (row.created.isoformat(timespec="seconds"), row.operator, row.file_name)
    yield from (row.product, row.product_version, row.verdict, row.score, row.threshold)
    yield from (row.severity, row.p_value, len(row.regions))
    yield "; ".join(region["position"] for region in row.regions)
    yield from (row.width, row.height, row.model, row.expert)
    yield None if feedback is None else ("right" if feedback.right else "wrong")
    yield None if feedback is None else feedback.word
    yield row.id
