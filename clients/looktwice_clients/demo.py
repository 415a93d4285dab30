"""`make demo`: start the real server on the small model, ask it about two pictures, show, stop.

Prints score, verdict, regions and the answer of examples/good.png and examples/scratched.png, asked
through the plain OpenAI SDK, and writes their overlay pictures to out/.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from looktwice_clients.errors import DemoError, one_line

CHECKOUT = Path(__file__).resolve().parents[2]
PICTURES = ("good.png", "scratched.png")
QUESTION = "Is there any defect in this picture? If so, where?"

START_SECONDS = 600.0
"""How long the server may take to start; on two cores it is about half a minute."""

STOP_SECONDS = 60.0
"""How long it may take to stop before it is killed."""


def main() -> int:
    """Run the demo; the exit code, 1 with one line on stderr where something is missing."""
    out = Path("out")
    out.mkdir(exist_ok=True)
    # A proxy has no business between the demo and its own server.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    try:
        pictures = example_pictures()
        with running_server("nano", out / "server.log") as url:
            print()
            for picture in pictures:
                ask(url, picture, out / f"{picture.stem}_overlay.png")
    except KeyboardInterrupt:
        print("demo: interrupted; the server is stopped", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("LOOKTWICE_DEBUG"):
            raise
        print(
            f"demo: {error if isinstance(error, DemoError) else one_line(error)}", file=sys.stderr
        )
        return 1
    return 0


def example_pictures() -> list[Path]:
    """The checkout's two pictures: a good part and a scratched one.

    Raises:
        DemoError: this is not a checkout, or they are not there.
    """
    pictures = [CHECKOUT / "examples" / name for name in PICTURES]
    for picture in pictures:
        if not picture.exists():
            raise DemoError(f"{picture} is missing: run the demo from a checkout (make demo)")
    return pictures


@contextmanager
def running_server(model: str, log: Path) -> Iterator[str]:
    """A server of its own on a free port of this machine; yields its API's address.

    Args:
        model: what `looktwice serve` is given.
        log: where its output goes.

    Raises:
        DemoError: it ended or did not become ready; with the last lines of its log.
    """
    port = free_port()
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "looktwice_clients", "serve", model, *address]
    print(f"$ looktwice serve {model} {' '.join(address)}    (log: {log})", flush=True)
    # Ended by its parent, the demo still ends its server.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(server)
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    """Return once `health` answers 200, showing the seconds that it takes.

    Raises:
        DemoError: the server ended, or took longer than `START_SECONDS`.
    """
    start = time.monotonic()
    live = sys.stderr.isatty()
    while not _answers(health):
        waited = time.monotonic() - start
        if server.poll() is not None:
            raise DemoError(f"the server ended with code {server.returncode}{_last_lines(log)}")
        if waited > START_SECONDS:
            raise DemoError(f"the server was not ready after {waited:.0f} s{_last_lines(log)}")
        if live:
            print(f"\rstarting the server ... {waited:.0f} s", end="", file=sys.stderr, flush=True)
        time.sleep(0.5)
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    print(f"server ready after {time.monotonic() - start:.0f} s", flush=True)


def _answers(health: str) -> bool:
    try:
        with urlopen(health, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def _last_lines(log: Path, lines: int = 15) -> str:
    """The end of the server's log, to stand behind an error."""
    words = log.read_text(errors="replace").strip().splitlines()[-lines:]
    return "".join(f"\n  | {line}" for line in words) if words else f"; {log} is empty"


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server with SIGTERM and wait; kill its processes if it does not end."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
            print(f"server stopped, exit code {server.returncode}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"the server did not stop in {STOP_SECONDS:.0f} s: killed", file=sys.stderr)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(url: str, picture: Path, overlay: Path) -> None:
    """Ask about one picture through the OpenAI SDK; print the facts and the words, draw the map."""
    from openai import OpenAI

    from looktwice_clients import Inspection, draw_overlay
    from looktwice_clients.images import to_wire

    client = OpenAI(base_url=url, api_key="none")
    content = [
        {"type": "image_url", "image_url": {"url": to_wire(picture)}},
        {"type": "text", "text": QUESTION},
    ]
    completion = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        max_tokens=128,
        temperature=0,
        extra_body={"inspection": {"map": True}},
    )
    inspection = Inspection.model_validate((completion.model_extra or {})["inspections"][0])
    draw_overlay(picture, inspection).save(overlay)
    print(f"{picture.name}\n  {inspection.facts()}")
    for region in inspection.regions:
        print(f"  region {list(region.box)} score {region.score:.3f} {region.position}")
    print(f"  > {QUESTION}\n  {completion.choices[0].message.content}\n  overlay: {overlay}\n")


if __name__ == "__main__":
    sys.exit(main())
