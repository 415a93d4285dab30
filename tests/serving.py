"""A real server for tests: started once, asked by everybody, ended by its process id."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """Where a running server listens, and its process."""

    url: str  # ends in /v1
    process: subprocess.Popen
    log: Path

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def running_server(log: Path, *flags: str, **environment: str) -> AbstractContextManager[Server]:
    """Run `looktwice serve` with the given flags until the block ends."""
    return _running([sys.executable, "-m", "looktwice_clients", "serve", *flags], log, environment)


def stock_server(log: Path, model: Path, *flags: str) -> AbstractContextManager[Server]:
    """Run vLLM's own server with its own LLaVA-OneVision until the block ends."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    environment = {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    return _running([*command, "--host", "127.0.0.1", *flags], log, environment)


@contextmanager
def _running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Run a server on a free port until the block ends."""
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    server = Server(f"http://127.0.0.1:{port}/v1", process, log)
    try:
        wait_until_up(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.root}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"the server did not start:\n{tail}")
