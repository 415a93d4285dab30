"""What goes wrong on the way, in every client: one clear line, nothing sent that should not be."""

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from openai import APIConnectionError, OpenAIError
from PIL import Image

from looktwice_clients import AsyncInspector, Inspector, ReplyError, doctor
from looktwice_clients.allowed_pictures import AllowedPictures
from looktwice_clients.cli import run
from looktwice_clients.errors import LookTwiceError, one_line
from looktwice_clients.langchain_tool import InspectionTool
from looktwice_clients.mcp_server import mcp_server

Way = Callable[[str, Path, float], str]


def with_inspector(url: str, picture: Path, timeout: float) -> str:
    try:
        with Inspector(url, timeout=timeout, max_retries=0) as inspector:
            return inspector.inspect(picture).verdict
    except Exception as error:
        return one_line(error, inspector.url)


def with_async_inspector(url: str, picture: Path, timeout: float) -> str:
    async def ask() -> str:
        async with AsyncInspector(url, timeout=timeout, max_retries=0) as inspector:
            return (await inspector.inspect(picture)).verdict

    try:
        return asyncio.run(ask())
    except Exception as error:
        return one_line(error, url)


def with_langchain(url: str, picture: Path, timeout: float) -> str:
    tool = InspectionTool(url=url, roots=[picture.parent], timeout=timeout)
    return tool.invoke({"image": picture.name})


def with_mcp(url: str, picture: Path, timeout: float) -> str:
    async def ask() -> str:
        async with AsyncInspector(url, timeout=timeout, max_retries=0) as inspector:
            async with Client(mcp_server(inspector, AllowedPictures([picture.parent]))) as client:
                result = await client.call_tool("inspect_image", {"image": picture.name})
                return result.content[0].text

    return asyncio.run(ask())


WAYS = [with_inspector, with_async_inspector, with_langchain, with_mcp]


def with_ask(url: str, picture: Path) -> str:
    try:
        with Inspector(url, max_retries=0) as inspector:
            return inspector.ask(picture, "Any defect?").text
    except (LookTwiceError, OpenAIError) as error:
        return one_line(error, url)


def with_async_ask(url: str, picture: Path) -> str:
    async def ask() -> str:
        async with AsyncInspector(url, max_retries=0) as inspector:
            return (await inspector.ask(picture, "Any defect?")).text

    try:
        return asyncio.run(ask())
    except (LookTwiceError, OpenAIError) as error:
        return one_line(error, url)


def with_stream(url: str, picture: Path) -> str:
    try:
        with Inspector(url, max_retries=0) as inspector:
            return "".join(inspector.chat(picture).stream("Any defect?"))
    except (LookTwiceError, OpenAIError) as error:
        return one_line(error, url)


def with_async_stream(url: str, picture: Path) -> str:
    async def ask() -> str:
        async with AsyncInspector(url, max_retries=0) as inspector:
            pieces = await inspector.chat(picture).stream("Any defect?")
            return "".join([piece async for piece in pieces])

    try:
        return asyncio.run(ask())
    except (LookTwiceError, OpenAIError) as error:
        return one_line(error, url)


def with_explain(url: str, picture: Path) -> str:
    async def ask() -> str:
        async with AsyncInspector(url, max_retries=0) as inspector:
            async with Client(mcp_server(inspector, AllowedPictures([picture.parent]))) as client:
                asked = {"image": picture.name, "question": "Any defect?"}
                return (await client.call_tool("explain", asked)).content[0].text

    return asyncio.run(ask())


def with_doctor(url: str, picture: Path) -> str:
    [finding] = doctor.server(url)
    assert finding.state == "problem"
    return finding.detail


ASKING = [with_ask, with_async_ask, with_stream, with_async_stream, with_explain, with_doctor]
"""Ways that ask for the server's models first."""


@pytest.fixture
def part(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (204, 0, 0)).save(tmp_path / "part.png")
    return tmp_path / "part.png"


class OtherServer(BaseHTTPRequestHandler):
    """A server that is not LookTwice."""

    status, content = 404, b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(self.status)
        kind = "application/json" if self.content.startswith(b"{") else "text/html"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[Callable[[int, bytes], str]]:
    server = HTTPServer(("127.0.0.1", 0), OtherServer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()

    def answering(status: int, content: bytes) -> str:
        OtherServer.status, OtherServer.content = status, content
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield answering
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_down_is_named_as_such(way: Way, part: Path) -> None:
    said = way("http://127.0.0.1:9/v1", part, 10)
    assert "cannot reach" in said
    assert "is `looktwice serve` running there" in said
    assert "\n" not in said


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_key_is_named_as_such_and_not_repeated(
    way: Way, part: Path, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.key = "right"
    monkeypatch.setenv("LOOKTWICE_API_KEY", "swordfish")
    said = way(wire.url, part, 10)
    assert "wants an API key: set LOOKTWICE_API_KEY" in said
    assert "swordfish" not in said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (
            404,
            b"<html>" + b"not here " * 5000,
            "HTTP 404 without a reason",
        ),
        (404, b'{"detail":"Not Found"}', "HTTP 404 without a reason"),
        (500, b"<html>" + b"broken " * 5000, "answered HTTP 500 without a reason"),
        (200, b"<html>hello</html>", "not a list of inspections"),
        (
            200,
            b'{"data": [{"id": "x"}]}',
            "not a list of inspections: data.0.score: Field required",
        ),
        (200, b'{"data": []}', "asked for one inspection, got 0"),
    ],
    ids=["404 page", "404 json", "500 page", "200 page", "200 other json", "200 empty json"],
)
def test_another_server_behind_the_address_is_told_in_a_short_line(
    way: Way,
    part: Path,
    other_server: Callable[[int, bytes], str],
    status: int,
    content: bytes,
    expected: str,
) -> None:
    said = way(other_server(status, content), part, 10)
    assert expected in said
    assert len(said) < 500


@pytest.mark.parametrize("way", ASKING)
@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (404, b"<html>" + b"not here " * 5000, "HTTP 404 without a reason"),
        (200, b"<html>hello</html>", "not a list of models"),
        (200, b'{"data": [7]}', "not a list of models: data.0"),
        (200, b'{"data": []}', "lists no model"),
        (200, b'{"data": [{"id": "x"}]}', "LookTwice"),
        (200, b'{"data": [{"id": "x"}], "choices": [{}], "inspections": []}', "LookTwice"),
    ],
    ids=["404 page", "200 page", "200 other json", "no model", "no choices", "no message"],
)
def test_another_server_that_is_asked_for_words_is_told_in_a_short_line(
    way: Callable[[str, Path], str],
    part: Path,
    other_server: Callable[[int, bytes], str],
    status: int,
    content: bytes,
    expected: str,
) -> None:
    said = way(other_server(status, content), part)
    assert expected in said
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("content", [b"<html>hello</html>", b"7", b'{"choices": 7}'])
def test_an_answer_of_another_server_is_no_answer(
    part: Path, other_server: Callable[[int, bytes], str], content: bytes
) -> None:
    with Inspector(other_server(200, content), model="x") as inspector:
        with pytest.raises(ReplyError, match="is this a LookTwice server"):
            inspector.ask(part, "Any defect?")


def test_words_without_an_inspection_are_no_explanation(
    part: Path, other_server: Callable[[int, bytes], str]
) -> None:
    choice = b'{"message": {"role": "assistant", "content": "Fine."}, "finish_reason": "stop"}'
    answer = b'{"data": [{"id": "x"}], "choices": [' + choice + b'], "inspections": []}'
    said = with_explain(other_server(200, answer), part)
    assert "answered without an inspection" in said


@pytest.mark.parametrize("event", [b"<html>", b"data: 7", b"data: {", b'data: {"choices": [{}]}'])
def test_a_stream_of_another_server_is_no_answer(
    part: Path, other_server: Callable[[int, bytes], str], event: bytes
) -> None:
    with Inspector(other_server(200, event + b"\n\n"), model="x") as inspector:
        with pytest.raises(ReplyError, match="is this a LookTwice server"):
            list(inspector.chat(part).stream("Any defect?"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("url", ["http://", "http://[", "http://a b/v1", "ftp://host/v1"])
def test_an_address_that_is_none_is_an_error_in_a_line(way: Way, part: Path, url: str) -> None:
    with Inspector(url, max_retries=0) as inspector, pytest.raises(APIConnectionError):
        inspector.inspect(part)
    said = way(url, part, 10)
    assert "cannot reach" in said
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("way", WAYS)
def test_a_slow_server_ends_in_time(way: Way, part: Path, wire: Any) -> None:
    wire.slowest = 20.0
    start = time.monotonic()
    said = way(wire.url, part, 0.3)
    assert "did not answer in time" in said
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("way", WAYS)
def test_a_huge_file_is_refused_unread(way: Way, part: Path, wire: Any) -> None:
    huge = part.with_name("huge.png")
    with huge.open("wb") as file:
        file.truncate(500_000_000)
    said = way(wire.url, huge, 10)
    assert "500 MB is too large, at most 100 MB" in said
    assert wire.requests == []


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_no_picture_is_not_sent(way: Way, part: Path, wire: Any) -> None:
    secret = part.with_name("passwords.png")
    secret.write_text("the password is swordfish")
    said = way(wire.url, secret, 10)
    assert "not a picture" in said
    assert "swordfish" not in said
    assert wire.requests == []


@pytest.mark.parametrize("command", ["inspect", "chat"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://[", "http://", "ftp://host/v1"])
def test_the_commands_end_with_one_line(
    part: Path,
    command: str,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Any defect?\n"))
    assert run([command, str(part), "--url", url]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("looktwice: ")


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "part.png"],
        ["chat", "part.png"],
        ["reference", "list"],
        ["reference", "show", "plate"],
        ["reference", "remove", "plate"],
        ["reference", "add", "plate", "part.png"],
    ],
    ids=" ".join,
)
def test_the_commands_wait_no_longer_than_they_are_told(
    part: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(part.parent)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("sys.stdin", io.StringIO("Any defect?\n"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        start = time.monotonic()
        assert run([*command, "--url", url, "--timeout", "0.3"]) == 1
        assert time.monotonic() - start < 30
    said = capsys.readouterr()
    assert "did not answer in time" in said.out + said.err


@pytest.mark.parametrize(
    ("command", "limits"),
    [
        (["mcp"], {"timeout": 600.0}),
        (["mcp", "--timeout", "7"], {"timeout": 7.0}),
        (["chatbot", "--port", "0"], {"timeout": 60.0, "max_retries": 1}),
        (["chatbot", "--port", "0", "--timeout", "7"], {"timeout": 7.0, "max_retries": 1}),
    ],
    ids=" ".join,
)
def test_the_servers_wait_no_longer_than_they_are_told(
    command: list[str], limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, float]] = []

    def noted(url: str | None, **limits: float) -> None:
        asked.append(limits)
        raise LookTwiceError("enough")

    monkeypatch.setattr("looktwice_clients.inspector.AsyncInspector", noted)
    assert run(command) == 1
    assert asked == [limits]


def test_no_time_at_all_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "part.png", "--timeout", "0"]) == 2
    assert "--timeout" in capsys.readouterr().err
