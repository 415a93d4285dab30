"""Sessions of the MCP SDK's own client with `looktwice mcp`, over stdio and over HTTP."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from tests.serving import free_port

COMMAND = ["-m", "looktwice_clients", "mcp"]
Use = Callable[[Client], Awaitable[Any]]


def over_stdio(root: Path, url: str, use: Use) -> Any:
    """What `use` returns of a process that may show `root` to the server at `url`."""
    environment = {"LOOKTWICE_URL": url, "NO_PROXY": "127.0.0.1"}
    arguments = [*COMMAND, "--root", str(root)]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=environment)

    async def session() -> Any:
        async with Client(parameters) as client:
            return await use(client)

    return asyncio.run(session())


@contextmanager
def http_server(root: Path, url: str) -> Iterator[str]:
    """`looktwice mcp --http` on a free port until the block ends; its address."""
    port = free_port()
    arguments = [*COMMAND, "--http", "--port", str(port), "--root", str(root), "--url", url]
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}/mcp"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx2.get(address, timeout=1)
                break
            except httpx2.TransportError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def over_http(address: str, use: Use, **headers: str) -> Any:
    """What `use` returns of the server at `address`."""

    async def session() -> Any:
        async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
            async with Client(streamable_http_client(address, http_client=http)) as client:
                return await use(client)

    return asyncio.run(session())
