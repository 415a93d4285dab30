"""`looktwice mcp`: the inspection for assistants that speak the Model Context Protocol."""

import os
from pathlib import Path

import click

from looktwice_clients.address import free_port, host_and_port
from looktwice_clients.cli import timeout_option, url_option

KEY = "LOOKTWICE_MCP_KEY"


@click.command()
@click.option(
    "--root",
    "roots",
    metavar="FOLDER",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Open this folder's pictures, and those below it; may be given several times.",
)
@click.option(
    "--allow-host",
    "hosts",
    metavar="HOST",
    multiple=True,
    help="Let pictures be fetched from this host, such as a camera's; '*' opens all.",
)
@click.option("--http", is_flag=True, help="Serve streamable HTTP at /mcp instead of stdio.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where --http listens.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8100,
    show_default=True,
    help="Its port; 0 takes a free one.",
)
@url_option
@timeout_option()
def mcp(
    roots: tuple[Path, ...],
    hosts: tuple[str, ...],
    http: bool,
    host: str,
    port: int,
    url: str | None,
    timeout: float,
) -> None:
    """Serve inspect_image, compare_with_reference, list_references and explain to an assistant.

    Over stdio, for an assistant that starts this command itself, or over HTTP, where
    $LOOKTWICE_MCP_KEY is the bearer key that requests must carry. No folder or host is open unless
    it is named here.
    """
    import anyio

    from looktwice_clients.allowed_pictures import AllowedPictures
    from looktwice_clients.inspector import AsyncInspector
    from looktwice_clients.mcp_server import MAX_BODY, mcp_server

    key = os.environ.get(KEY) or None
    key = key and key.strip()  # a file's last line end comes along
    if key == "":
        raise click.UsageError(f"${KEY} is blank: set a key, or unset it")
    if http and host not in ("127.0.0.1", "localhost", "::1") and key is None:
        raise click.UsageError(f"--host {host} opens it to the network: set ${KEY} first")

    if http:
        port = free_port(host, port)

    async def serve() -> None:
        async with AsyncInspector(url, timeout=timeout) as inspector:
            server = mcp_server(inspector, AllowedPictures(roots, hosts), key if http else None)
            if not http:
                await server.run_stdio_async()
                return
            click.echo(f"looktwice: MCP on http://{host_and_port(host, port)}/mcp", err=True)
            await server.run_streamable_http_async(
                host=host, port=port, max_request_body_size=MAX_BODY
            )

    anyio.run(serve)
