"""The end of a server: Ctrl-C, SIGTERM and a killed worker end every process that it started.

Each test but the one that stops a server while it starts needs a server of its own. The camera's
server goes on with the references of one that was killed while it took some.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from looktwice_clients.langchain_tool import InspectionTool
from tests.punched_plates import plate
from tests.server import bad_input_table
from tests.server.bad_input_table import API_KEY, CAMERA_FLAGS, QUESTION, camera
from tests.server.wire import (
    INSPECTIONS,
    Sent,
    ask,
    chat,
    data_uri,
    encoded,
    good_uri,
    image,
    inspect,
    scratched,
)
from tests.serving import Server, free_port, wait_until_up

pytestmark = pytest.mark.server
END_SECONDS = 60


@contextmanager
def own_server(log: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server that is starting, in a session of its own as under a terminal."""
    port = free_port()
    command = [sys.executable, "-m", "looktwice_clients", "serve", *flags, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=os.environ | environment,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}/v1", process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@dataclass(frozen=True)
class Process:
    """A line of the kernel's list of processes."""

    pid: int
    name: str
    parent: int
    session: int


def living() -> Iterator[Process]:
    """All processes of the machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            stat = (folder / "stat").read_text()
            name, _, fields = stat.partition("(")[2].rpartition(")")
            state, parent, _, session = fields.split()[:4]
            if state != "Z":
                yield Process(int(folder.name), name, int(parent), int(session))


def processes(server: Server) -> list[Process]:
    """The server's: its watching process and, in a session of its own, those that serve."""
    watcher = server.process.pid
    sessions = {watcher} | {one.session for one in living() if one.parent == watcher}
    return [one for one in living() if one.session in sessions]


def named(server: Server, name: str) -> list[int]:
    """The server's processes whose name begins like this."""
    return [one.pid for one in processes(server) if one.name.startswith(name)]


def wait_for_end(server: Server, before: list[Process]) -> int:
    """The server's exit code, with none left of what ran before and its port closed."""
    code = server.process.wait(END_SECONDS)
    sessions = {one.session for one in before}
    deadline = time.monotonic() + 10
    while left := [one for one in living() if one.session in sessions]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection(urlsplit(server.root).netloc, timeout=5).connect()
    return code


@dataclass(frozen=True)
class Killed:
    """What a server left that was killed while it took a reference."""

    store: Path
    before: dict[str, Any]  # the reference that it had


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A server that has a reference, killed with -9 while it takes another of its name."""
    folder = tmp_path_factory.mktemp("killed")
    left = folder / "references"
    flags = ("nano", "--dtype", "float32", "--enforce-eager")
    with own_server(folder / "log", *flags, LOOKTWICE_REFERENCES=str(left)) as server:
        wait_until_up(server)
        before = ask(server, put_plates(range(2))).data
        with ThreadPoolExecutor() as pool:
            update = pool.submit(ask, server, put_plates(range(2, 42)), timeout=120)
            time.sleep(1.5)
            assert not update.done()
            for one in processes(server):
                os.kill(one.pid, signal.SIGKILL)
            with pytest.raises((OSError, http.client.HTTPException)):
                update.result()
    return Killed(left, before)


def put_plates(seeds: Iterable[int], **keys: Any) -> Sent:
    """A request that makes a reference of some plates."""
    pictures = [data_uri(encoded(plate(seed))) for seed in seeds]
    return Sent("/v1/references/plates", {"images": pictures}, "PUT", **keys)


@pytest.fixture(scope="module")
def camera_server(killed: Killed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an allow-list and an API key, on what the killed one left."""
    log = tmp_path_factory.mktemp("camera_server") / "log"
    with own_server(log, *CAMERA_FLAGS, LOOKTWICE_REFERENCES=str(killed.store)) as server:
        wait_until_up(server)
        yield server


def test_a_camera_on_the_allow_list_is_asked_with_the_key(camera_server: Server) -> None:
    key = {"Authorization": f"Bearer {API_KEY}"}
    with camera() as address:
        sent = Sent(INSPECTIONS, {"images": [f"{address}/200", good_uri()]}, headers=key)
        first, second = ask(camera_server, sent).data["data"]
    assert first["score"] == second["score"]


def test_the_langchain_tool_inspects_by_a_cameras_address(camera_server: Server) -> None:
    tool = InspectionTool(url=camera_server.url, api_key=API_KEY, hosts=["127.0.0.1"])
    with camera() as address:
        arguments = {"image": f"{address}/200", "overlay": True}
        call = {"name": tool.name, "args": arguments, "id": "1", "type": "tool_call"}
        message = tool.invoke(call)
    assert (message.status, message.artifact.verdict) == ("success", "anomalous")
    assert (message.artifact.width, message.artifact.height) == scratched().size
    assert [block["type"] for block in message.content] == ["text", "image"]


def test_metrics_and_health_need_no_key_and_the_other_routes_do(camera_server: Server) -> None:
    def status(path: str) -> int:
        return ask(camera_server, Sent(path, method="GET")).status

    assert [status(path) for path in ("/metrics", "/health")] == [200, 200]
    assert [status(path) for path in ("/v1/models", "/v1/references")] == [401, 401]


def test_kill_9_while_a_reference_is_added_leaves_the_one_before(
    camera_server: Server, killed: Killed
) -> None:
    key = {"Authorization": f"Bearer {API_KEY}"}
    kept = ask(camera_server, Sent("/v1/references/plates", method="GET", headers=key))
    assert kept.data == killed.before
    asked = inspect(data_uri(encoded(plate(100))), reference="plates")
    [answer] = ask(camera_server, replace(asked, headers=key)).data["data"]
    used = answer["reference"]
    assert (used["name"], used["version"]) == ("plates", killed.before["version"])
    after = ask(camera_server, put_plates(range(2, 4), headers=key)).data
    assert after["version"] != killed.before["version"]


def test_the_page_says_what_this_server_answered(camera_server: Server) -> None:
    title, rows, answers = bad_input_table.camera_section(camera_server)
    assert [answer.status for answer in answers] == [row.status for row in rows]
    assert bad_input_table.table(title, rows, answers) in bad_input_table.PAGE.read_text()


def test_ctrl_c_ends_every_process_while_a_client_is_served(camera_server: Server) -> None:
    key = {"Authorization": f"Bearer {API_KEY}"}
    endless = chat(image(good_uri()), QUESTION, max_tokens=3000, ignore_eos=True)
    with ThreadPoolExecutor() as pool:
        pool.submit(ask, camera_server, Sent(endless.path, endless.body, headers=key))
        time.sleep(1)
        before = processes(camera_server)
        os.killpg(camera_server.process.pid, signal.SIGINT)
        code = wait_for_end(camera_server, before)
    assert "process of the server died" not in camera_server.log.read_text()
    assert code == 0


def test_sigterm_ends_every_process_of_a_server_that_starts(tmp_path: Path) -> None:
    with own_server(tmp_path / "log", *CAMERA_FLAGS) as server:
        deadline = time.monotonic() + 120
        while not named(server, "VLLM::Engine") and time.monotonic() < deadline:
            time.sleep(0.2)
        before = processes(server)
        server.process.terminate()
        assert wait_for_end(server, before) == 0
    assert "process of the server died" not in server.log.read_text()


@pytest.mark.parametrize(
    ("name", "how"), [("VLLM::Worker", signal.SIGKILL), ("VLLM::Engine", signal.SIGTERM)]
)
def test_a_lost_process_ends_the_server_with_a_message_and_a_code(
    tmp_path: Path, name: str, how: signal.Signals
) -> None:
    with own_server(tmp_path / "log", "nano", "--dtype", "float32", "--enforce-eager") as server:
        wait_until_up(server)
        before = processes(server)
        [lost] = named(server, name)
        connection = http.client.HTTPConnection(urlsplit(server.root).netloc, timeout=60)
        body = chat(image(good_uri()), QUESTION, stream=True, max_tokens=3000, ignore_eos=True).body
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        os.kill(lost, how)
        rest = response.read()
        assert b'"error"' in rest
        assert b'"finish_reason":"' not in rest  # half an answer does not end like a whole one
        assert wait_for_end(server, before) == 1
    last = [line for line in server.log.read_text().splitlines() if line.startswith("looktwice:")]
    assert last == [
        "looktwice: a process of the server died and the server has ended; the log above says why "
        "(often the machine's memory was full). Start the server again"
    ]
