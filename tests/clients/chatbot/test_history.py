"""History and feedback on SQLite; tests/system/chatbot/ does the same on PostgreSQL."""

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta, timezone

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, inspect, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DataError

from looktwice_clients.chatbot import history as history_module
from looktwice_clients.chatbot.database import connect, database_url, downgrade, upgrade
from looktwice_clients.chatbot.history import PAGE, History
from looktwice_clients.chatbot.tables import Table, UtcDateTime
from looktwice_clients.errors import DatabaseError
from tests.clients.chatbot.rows import NOON, feedback, inspection


def lines_of(history: History, owner: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(history.as_csv(owner), newline="")))


def test_an_inspection_comes_back_as_it_was_saved_its_overlay_on_request(history):
    row = inspection()
    assert history.save(row)
    [entry], total = history.page("a")
    assert total == 1
    columns = [column.key for column in inspect(type(row)).columns if column.key != "overlay"]
    assert [getattr(entry.inspection, c) for c in columns] == [getattr(row, c) for c in columns]
    assert history.overlay("a", row.id) == b"jpeg of a"


def test_nobody_sees_an_inspection_of_somebody_else(history):
    row = inspection(owner="a")
    history.save(row)
    assert history.page("b") == ([], 0)
    assert history.overlay("b", row.id) is None
    assert lines_of(history, "b") == []


def test_saving_again_keeps_one(history):
    row = inspection()
    said = feedback(row)
    for _ in range(2):
        history.save(row, said)
    assert history.page("a")[1] == 1
    assert len(lines_of(history, "a")) == 1


def test_two_threads_may_save_the_same_inspection(history):
    for _ in range(10):
        row = inspection()
        pairs = [(row, None), (row, feedback(row)), (row, feedback(row)), (row, None)]
        with ThreadPoolExecutor(len(pairs)) as pool:
            assert all(pool.map(lambda pair: history.save(*pair), pairs))
    assert history.page("a")[1] == 10


def test_feedback_brings_an_inspection_along_that_could_not_be_saved(history):
    row = inspection()
    history.save(row, feedback(row, word="scratch"))
    [entry], _ = history.page("a")
    assert (entry.feedback.right, entry.feedback.word) == (True, "scratch")


def test_the_latest_feedback_counts(history):
    row = inspection()
    history.save(row, feedback(row, minute=2, right=False, word="dust"))
    history.save(row, feedback(row, minute=1, right=True, word="scratch"))
    [entry], _ = history.page("a")
    assert (entry.feedback.right, entry.feedback.word) == (False, "dust")


@pytest.mark.parametrize("zone", [None, timezone(timedelta(hours=9))])
def test_a_time_comes_back_in_utc_whichever_zone_the_database_gives(zone):
    given = NOON.astimezone(zone) if zone else NOON.replace(tzinfo=None)
    found = UtcDateTime().process_result_value(given, postgresql.dialect())
    assert (found, found.tzinfo) == (NOON, UTC)


def test_what_another_chatbot_writes_while_rows_move_is_not_lost(history, tmp_path, monkeypatch):
    history._waiting = connect(database_url(f"sqlite:///{tmp_path}/waiting.sqlite", tmp_path))
    upgrade(history._waiting)
    row, write = inspection(), history_module._merge
    write(history._waiting, [row, feedback(row)])

    def meanwhile(engine, rows):
        write(history._waiting, [inspection(), feedback(row, minute=1, word="scratch")])
        write(engine, rows)

    with monkeypatch.context() as patch:
        patch.setattr(history_module, "_merge", meanwhile)
        assert history.move_waiting() == 2
    assert history.waiting() == 3  # the new ones, and the row that is spoken of
    assert history.move_waiting() == 3
    assert history.waiting() == 0
    assert sorted(line["word"] for line in lines_of(history, "a")) == ["", "scratch"]


def test_what_the_database_refuses_holds_up_nothing_else(history, tmp_path, monkeypatch, caplog):
    history._waiting = connect(database_url(f"sqlite:///{tmp_path}/waiting.sqlite", tmp_path))
    upgrade(history._waiting)
    write = history_module._merge
    first, refused, last = inspection(), inspection(verdict="x" * 33), inspection()
    write(history._waiting, [first, refused, feedback(refused), last])

    def strict(engine, rows):
        """As PostgreSQL is; SQLite takes a word of any length."""
        if engine is history._engine and len(rows[0].verdict) > 32:
            raise DataError(None, None, ValueError("value too long"))
        write(engine, rows)

    monkeypatch.setattr(history_module, "_merge", strict)
    assert history.move_waiting() == 2
    assert history.move_waiting() == 0
    assert history.waiting() == 0  # nothing that another try would move
    [told] = caplog.messages  # once, not every time
    assert told == f"inspection {refused.id} stays in the file: value too long"
    assert {line["id"] for line in lines_of(history, "a")} == {first.id, last.id}
    with pytest.raises(DatabaseError, match="value too long"):
        history.save(inspection(verdict="x" * 33))
    assert history.waiting() == 0


def test_pages_go_from_the_newest_to_the_oldest(history):
    for minute in range(PAGE + 2):
        history.save(inspection(minute=minute, file_name=f"{minute}.png"))
    first, total = history.page("a", 0)
    second, _ = history.page("a", 1)
    names = [entry.inspection.file_name for entry in [*first, *second]]
    assert total == PAGE + 2
    assert len(first) == PAGE
    assert names == [f"{minute}.png" for minute in reversed(range(PAGE + 2))]


def test_the_csv_has_a_line_an_inspection_with_its_feedback(history):
    row = inspection(file_name="Prüfling, 부품.png")
    history.save(row, feedback(row, right=False, word="dust\nof the press"))
    [line] = lines_of(history, "a")
    assert line["file"] == "Prüfling, 부품.png"
    assert line["created"] == "2026-03-01T12:00:00+00:00"
    assert (line["verdict"], line["score"], line["places"]) == ("anomalous", "0.87", "top left")
    assert (line["feedback"], line["word"]) == ("wrong", "dust\nof the press")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_no_spreadsheet_runs_what_a_file_is_called(history, name):
    history.save(inspection(file_name=name))
    assert lines_of(history, "a")[0]["file"] == f"'{name}"


def test_migrations_make_the_tables_of_the_code_and_take_them_away(tmp_path):
    engine = connect(database_url(f"sqlite:///{tmp_path}/x.sqlite", tmp_path))
    upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    upgrade(engine)
    row = inspection()
    history = History(engine.url, tmp_path)
    assert history.save(row, feedback(row))
    history.close()
    downgrade(engine)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    upgrade(engine)
    assert set(inspect(engine).get_table_names()) == {"alembic_version", *Table.metadata.tables}


def test_a_database_of_a_newer_version_is_refused_in_one_line(tmp_path):
    url = database_url(None, tmp_path)
    History(url, tmp_path).close()
    with connect(url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match=r"another version of LookTwice.*9999"):
        History(url, tmp_path)


def test_a_database_that_cannot_be_opened_is_refused_without_its_password(tmp_path):
    url = database_url("postgresql://kim:secret@127.0.0.1:1/plant", tmp_path)
    assert url.drivername == "postgresql+psycopg"
    with pytest.raises(DatabaseError, match="cannot open the database") as refused:
        History(url, tmp_path)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("own", ["", "?options=-c%20search_path%3Dplant"])
def test_postgresql_is_told_to_give_up_on_locks_and_long_statements(tmp_path, own):
    engine = connect(database_url(f"postgresql://kim@127.0.0.1:1/plant{own}", tmp_path))
    told: dict[str, object] = {}

    @event.listens_for(engine, "do_connect")
    def note(dialect, record, args, parameters):
        told.update(parameters)
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    options = str(told["options"])
    assert options.endswith("-c lock_timeout=3s -c statement_timeout=15s")
    assert ("search_path=plant" in options) == bool(own)


@pytest.mark.parametrize("address", ["mysql://kim:secret@host/plant", "plant", "oracle://x"])
def test_another_kind_of_database_is_refused(tmp_path, address):
    with pytest.raises(DatabaseError, match="postgresql://") as refused:
        database_url(address, tmp_path)
    assert "secret" not in str(refused.value)


def test_the_default_is_a_file_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LOOKTWICE_DATABASE", raising=False)
    assert database_url(None, tmp_path).database == str(tmp_path / "chatbot.sqlite")
    monkeypatch.setenv("LOOKTWICE_DATABASE", "sqlite:////elsewhere.sqlite")
    assert database_url(None, tmp_path).database == "/elsewhere.sqlite"


def test_a_file_that_cannot_be_written_is_told(history, tmp_path):
    history.close()
    (tmp_path / "history.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        history.save(inspection())
    with pytest.raises(DatabaseError, match="not a database"):
        history.page("a")
