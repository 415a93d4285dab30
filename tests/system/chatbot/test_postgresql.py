"""The chatbot on a real PostgreSQL: migrations, a crash and a return of the database."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from playwright.sync_api import expect
from sqlalchemy import inspect, select, text
from sqlalchemy.orm import Session

from looktwice_clients.chatbot import database
from looktwice_clients.chatbot.database import connect, database_url, downgrade, upgrade
from looktwice_clients.chatbot.history import History
from looktwice_clients.chatbot.tables import FeedbackRow, InspectionRow, Table
from looktwice_clients.errors import DatabaseError
from tests.clients.chatbot.rows import feedback, inspection
from tests.clients.conftest import encoded, red
from tests.system.chatbot import visit as person
from tests.system.chatbot.cluster import Cluster
from tests.system.chatbot.visit import running_chatbot

THREADS = 8


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.start()
    yield cluster
    cluster.remove()


def rows(cluster: Cluster, table: type) -> list:
    engine = connect(database_url(cluster.url, Path()))
    with Session(engine) as session:
        found = session.scalars(select(table).order_by(table.created)).all()
    engine.dispose()
    return found


def test_migrations_make_the_tables_of_the_code_and_take_them_away(cluster, tmp_path):
    engine = connect(database_url(cluster.url, tmp_path))
    upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    row = inspection()
    history = History(engine.url, tmp_path)
    assert history.save(row, feedback(row))
    history.close()
    downgrade(engine)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    upgrade(engine)
    assert set(inspect(engine).get_table_names()) == {"alembic_version", *Table.metadata.tables}
    engine.dispose()


def test_what_is_saved_while_the_database_is_away_waits_and_moves_once(cluster, tmp_path):
    history = History(database_url(cluster.url, tmp_path), tmp_path)
    before, while_away = inspection(minute=0), inspection(minute=1, file_name="부품 Prüfling")
    assert history.save(before)
    cluster.kill()
    assert not history.save(while_away)
    assert not history.save(before, feedback(before, word="scratch"))
    assert history.waiting() == 3
    assert history.move_waiting() == 0
    history.close()

    cluster.start()
    history = History(database_url(cluster.url, tmp_path), tmp_path)  # as after a restart
    assert history.move_waiting() == 3
    assert history.waiting() == 0
    entries, total = history.page("a")
    assert total == 2
    assert [entry.inspection.file_name for entry in entries] == ["부품 Prüfling", "part.png"]
    assert [entry.feedback and entry.feedback.word for entry in entries] == [None, "scratch"]
    assert history.overlay("a", while_away.id) == b"jpeg of a"
    history.close()


def test_what_the_database_refuses_holds_up_nothing_else(cluster, tmp_path):
    history = History(database_url(cluster.url, tmp_path), tmp_path)
    too_long, others = inspection(verdict="x" * 33), [inspection(), inspection()]
    cluster.kill()
    for row in (others[0], too_long, others[1]):
        assert not history.save(row)
    cluster.start()
    assert history.move_waiting() == 2
    assert history.waiting() == 0  # nothing that another try would move
    assert {entry.inspection.id for entry in history.page("a")[0]} == {row.id for row in others}
    with pytest.raises(DatabaseError, match="value too long"):
        history.save(too_long)
    history.close()


def test_a_letter_that_the_databases_encoding_lacks_is_refused_like_any_other(cluster, tmp_path):
    plain = connect(database_url(cluster.url, tmp_path))
    with plain.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(
            "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
        )
    plain.dispose()
    history = History(database_url(cluster.url.replace("/postgres", "/latin"), tmp_path), tmp_path)
    with pytest.raises(DatabaseError, match="no equivalent in encoding"):
        history.save(inspection(verdict="이상"))
    assert history.save(inspection(verdict="größer"))
    history.close()


def test_what_is_saved_while_somebody_holds_the_table_waits_and_moves(cluster, tmp_path):
    history = History(database_url(cluster.url, tmp_path), tmp_path)
    holder = connect(database_url(cluster.url, tmp_path))
    with holder.begin() as connection:
        connection.execute(text("LOCK TABLE inspections IN ACCESS EXCLUSIVE MODE"))
        began = time.monotonic()
        assert not history.save(inspection())
        with pytest.raises(DatabaseError, match="lock timeout"):
            history.page("a")
        assert time.monotonic() - began < 20
    assert history.move_waiting() == 1
    assert history.page("a")[1] == 1
    holder.dispose()
    history.close()


def test_a_migration_waits_for_the_database_as_long_as_it_must(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_LOCK_SECONDS", 1)
    monkeypatch.setattr(database, "_STATEMENT_SECONDS", 1)
    engine, holder = (connect(database_url(cluster.url, tmp_path)) for _ in range(2))
    lock = f"SELECT pg_advisory_xact_lock({database._MIGRATION_LOCK})"
    with ThreadPoolExecutor(1) as pool:
        with holder.begin() as connection:
            connection.execute(text(lock))
            upgrading = pool.submit(upgrade, engine)
            time.sleep(3)
            assert not upgrading.done()
        upgrading.result(60)
    for one in (engine, holder):
        one.dispose()


def test_what_threads_save_while_the_database_dies_and_returns_is_there_once(cluster, tmp_path):
    history = History(database_url(cluster.url, tmp_path), tmp_path)
    saved: dict[bool, list[str]] = {True: [], False: []}
    over = threading.Event()

    def save_until_over() -> None:
        while not over.is_set():
            row = inspection()
            saved[history.save(row, feedback(row))].append(row.id)

    def wait_for_more(kept: bool) -> None:
        goal, deadline = len(saved[kept]) + 10 * THREADS, time.monotonic() + 60
        while len(saved[kept]) < goal and time.monotonic() < deadline:
            time.sleep(0.02)

    with ThreadPoolExecutor(THREADS) as pool, ExitStack() as end:
        end.callback(over.set)
        saving = [pool.submit(save_until_over) for _ in range(THREADS)]
        wait_for_more(kept=True)
        cluster.kill()
        wait_for_more(kept=False)
        cluster.start()
        moved = history.move_waiting()
        wait_for_more(kept=True)
    for thread in saving:
        thread.result()

    moved += history.move_waiting()
    assert moved == 2 * len(saved[False]) >= 20 * THREADS
    assert history.waiting() == 0
    expected = sorted(saved[True] + saved[False])
    assert sorted(row.id for row in rows(cluster, InspectionRow)) == expected
    assert sorted(row.inspection_id for row in rows(cluster, FeedbackRow)) == expected
    history.close()


def test_a_crash_of_the_database_is_told_nothing_is_lost_and_it_recovers(
    cluster, plant, visit, tmp_path
):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    first.write_bytes(encoded(red(222)))
    second.write_bytes(encoded(red(30)))
    with running_chatbot(tmp_path, plant.url, "--database", cluster.url) as chatbot:
        page = visit(chatbot.url)
        person.inspect(page, first)
        person.past(page, 1)

        cluster.restart()  # between two pictures: nobody notices
        person.open_tab(page, "Inspect")
        person.say(page, "right", "scratch")
        expect(page.locator("#feedback-said")).to_contain_text("Thank you")

        cluster.kill()
        person.inspect(page, second)
        assert person.verdict(page) == "normal"
        expect(page.locator("#said")).to_contain_text("database cannot be reached")
        person.say(page, "wrong", "dent")
        expect(page.locator("#feedback-said")).to_contain_text("feedback is kept here")
        person.past(page, 0)
        expect(page.locator("#past").get_by_role("alert")).to_contain_text("Nothing is lost")
        assert page.request.get(f"{chatbot.url}/history.csv").status == 503

        cluster.start()
        for _ in range(120):
            if len(rows(cluster, FeedbackRow)) == 2:
                break
            page.wait_for_timeout(500)
        newest, oldest = person.past(page, 2)
        assert "second.png" in newest
        assert "Wrong: dent" in newest
        assert "first.png" in oldest
        assert "Right: scratch" in oldest
        told = [(line["file"], line["feedback"], line["word"]) for line in person.exported(page)]
        assert told == [("second.png", "wrong", "dent"), ("first.png", "right", "scratch")]
    assert [row.file_name for row in rows(cluster, InspectionRow)] == ["first.png", "second.png"]
    assert "plant-secret" not in chatbot.log.read_text()
