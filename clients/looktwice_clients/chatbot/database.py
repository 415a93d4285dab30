"""The chatbot's database: an address -> an engine, its tables at the newest revision.

SQLite needs nothing; PostgreSQL is reached through psycopg.
"""

import os
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from looktwice_clients.errors import DatabaseError

MIGRATIONS = Path(__file__).parent / "migrations"

_CONNECT_SECONDS = 3
_LOCK_SECONDS = 3  # how long a row or table that somebody else holds is waited for
_STATEMENT_SECONDS = 15
_MIGRATION_LOCK = 5_410_172_011  # any number that only this program takes


def data_home() -> Path:
    """This program's data: $XDG_DATA_HOME/looktwice, else ~/.local/share/looktwice."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "looktwice"


def database_url(address: str | None, folder: Path) -> URL:
    """The database's address: as given, else $LOOKTWICE_DATABASE, else a file in `folder`.

    Args:
        address: postgresql://USER:PASSWORD@HOST/NAME or sqlite:///FILE.
        folder: where chatbot.sqlite lies by default.

    Raises:
        DatabaseError: it is none of these; the text never holds the password.
    """
    chosen = address or os.environ.get("LOOKTWICE_DATABASE")
    if not chosen:
        return URL.create("sqlite", database=str(folder / "chatbot.sqlite"))
    try:
        url = make_url(chosen)
    except ArgumentError:
        raise DatabaseError("cannot read the database's address: " + _EXAMPLES) from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        return url
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise DatabaseError(f"cannot use a {backend} database: {_EXAMPLES}")


_EXAMPLES = "give postgresql://USER:PASSWORD@HOST/NAME or sqlite:////var/lib/looktwice/FILE"


def connect(url: URL) -> Engine:
    """An engine that notices a restarted database, and gives up in seconds where it must wait."""
    if url.get_backend_name() == "sqlite":
        if url.database and url.database != ":memory:":
            Path(url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = create_engine(url)
        event.listen(engine, "connect", _prepare_sqlite)
        return engine
    limits = {"lock_timeout": _LOCK_SECONDS, "statement_timeout": _STATEMENT_SECONDS}
    own = url.query.get("options", "")
    options = [*((own,) if isinstance(own, str) else own)]
    options += [f"-c {name}={seconds}s" for name, seconds in limits.items()]
    settings = {
        "client_encoding": "utf8",  # else the driver meets a letter that the database lacks first
        "connect_timeout": _CONNECT_SECONDS,
        "tcp_user_timeout": 1000 * _CONNECT_SECONDS,
        "options": " ".join(options).strip(),
    }
    return create_engine(url, pool_pre_ping=True, pool_timeout=10, connect_args=settings)


def _prepare_sqlite(connection: DBAPIConnection, _: object) -> None:
    """Readers beside a writer, and foreign keys that hold."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to `revision`, the newest by default.

    Raises:
        DatabaseError: the database cannot be reached, or is newer than this program.
    """
    _migrate(engine, revision, command.upgrade)


def downgrade(engine: Engine, revision: str = "base") -> None:
    """Take the tables back to `revision`: by default to none, with all that is in them.

    Raises:
        DatabaseError: as for `upgrade`.
    """
    _migrate(engine, revision, command.downgrade)


def _migrate(engine: Engine, revision: str, change: Callable[[Config, str], None]) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    where = engine.url.render_as_string(hide_password=True)
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                for limit in ("lock_timeout", "statement_timeout"):  # a migration may be long
                    connection.execute(text(f"SET LOCAL {limit} = 0"))
                # Two chatbots that start at once go one after the other.
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            config.attributes["connection"] = connection
            change(config, revision)
    except CommandError as error:
        raise DatabaseError(
            f"the database {where} was made by another version of LookTwice ({error})"
        ) from None
    except SQLAlchemyError as error:
        raise DatabaseError(f"cannot open the database {where}: {cause(error)}") from None


def cause(error: SQLAlchemyError) -> str:
    """What the driver says, in one line, without SQL or data."""
    return " ".join(str(getattr(error, "orig", None) or type(error).__name__).split())
