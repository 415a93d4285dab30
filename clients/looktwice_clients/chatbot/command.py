"""`looktwice chatbot`: the page for the plant, on an address of this machine."""

import logging
import os
import signal
import sys
import tempfile
from typing import TYPE_CHECKING

import click

from looktwice_clients.address import free_port, host_and_port
from looktwice_clients.cli import timeout_option, url_option

if TYPE_CHECKING:
    from looktwice_clients.inspector import AsyncInspector

SHORTEST_KEY = 8

TIMEOUT = 60.0
"""Seconds that an operator waits before the inspection or answer is tried once more."""

GOODBYE_SECONDS = 5
"""How long open pages may hold up the end; each keeps a connection as long as it is open."""


@click.command()
@url_option
@timeout_option(TIMEOUT)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="Port; 0 takes a free one.",
)
@click.option(
    "--database",
    metavar="URL",
    help="Where history and feedback are kept: sqlite:///FILE or postgresql://...; else "
    "$LOOKTWICE_DATABASE, else a file in the data folder of this user.",
)
@click.option(
    "--key",
    metavar="KEY",
    help="What operators must type to log in; else $LOOKTWICE_CHATBOT_KEY, else no login.",
)
def chatbot(
    url: str | None,
    timeout: float,
    host: str,
    port: int,
    database: str | None,
    key: str | None,
) -> None:
    """Serve the inspection page: pictures in, verdicts, answers and a history out.

    The server that inspects is at --url, with the key $LOOKTWICE_API_KEY.
    """
    key = key or os.environ.get("LOOKTWICE_CHATBOT_KEY") or None
    key = key and key.strip()  # a file's last line end comes along
    if key is not None and len(key) < SHORTEST_KEY:
        raise click.UsageError(f"the key must have at least {SHORTEST_KEY} characters.")
    port = free_port(host, port)
    from looktwice_clients.inspector import AsyncInspector

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the pictures are removed
    with tempfile.TemporaryDirectory(prefix="looktwice-chatbot-") as pictures:
        _set_gradio(pictures)
        _serve(AsyncInspector(url, timeout=timeout, max_retries=1), host, port, database, key)


def _set_gradio(pictures: str) -> None:
    """Gradio reads these when it is imported: nothing is told to anybody, pictures stay private."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": pictures,
    }


def _serve(
    inspector: "AsyncInspector", host: str, port: int, database: str | None, key: str | None
) -> None:
    """Open the database and run the page until it is told to stop."""
    import uvicorn

    from looktwice_clients.chatbot.application import create
    from looktwice_clients.chatbot.database import data_home, database_url
    from looktwice_clients.chatbot.history import History

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    folder = data_home()
    address = database_url(database, folder)
    history = History(address, folder)
    application = create(inspector, history, key)
    kept = address.render_as_string(hide_password=True)
    where = host_and_port(host, port)
    click.echo(f"http://{where}/  server {inspector.url}  history {kept}")
    if key is None and not host.startswith("127.") and host not in ("localhost", "::1"):
        click.echo("looktwice: without --key whoever reaches this address may use it", err=True)
    uvicorn.run(
        application,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )
