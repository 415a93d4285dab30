"""The MCP server, asked by the SDK's own client: in process, over stdio, and over HTTP."""

import asyncio
import base64
import io
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import pytest
from jsonschema import validate
from mcp import Client
from mcp.server.mcpserver import MCPServer
from PIL import Image

from looktwice_clients import AsyncInspector, Inspection, cli_mcp
from looktwice_clients.allowed_pictures import AllowedPictures
from looktwice_clients.cli import run
from looktwice_clients.images import to_wire
from looktwice_clients.mcp_server import MAX_BODY, mcp_server
from tests.clients.mcp_sessions import COMMAND, http_server, over_http, over_stdio

TOOLS = ["inspect_image", "compare_with_reference", "list_references", "explain"]


@pytest.fixture
def line(tmp_path: Path, wire: Any) -> Path:
    """An open folder with a picture, a file that only looks like one, and a way out."""
    folder = tmp_path / "line"
    folder.mkdir()
    Image.new("RGB", (40, 30), (204, 0, 0)).save(folder / "part.png")
    (folder / "notes.png").write_text("the password is swordfish")
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    return folder


def asked(line: Path, tool: str, **arguments: Any) -> Any:
    """One call of a tool of a server in this process."""

    async def call() -> Any:
        async with AsyncInspector(max_retries=0) as inspector:
            server = mcp_server(inspector, AllowedPictures([line]))
            async with Client(server) as client:
                return await client.call_tool(tool, arguments)

    return asyncio.run(call())


def text(result: Any) -> str:
    return result.content[0].text


async def everything(client: Client) -> dict[str, Any]:
    """All four tools, asked once each, and what the server says of itself."""
    listed = {tool.name: tool for tool in (await client.list_tools()).tools}
    part = {"image": "part.png"}
    return {
        "tools": listed,
        "inspected": await client.call_tool("inspect_image", part),
        "compared": await client.call_tool(
            "compare_with_reference", part | {"reference": "bottle", "overlay": False}
        ),
        "references": await client.call_tool("list_references", {}),
        "explained": await client.call_tool(
            "explain", part | {"question": "Any defect?", "reference": "bottle"}
        ),
        "refused": await client.call_tool("inspect_image", {"image": "out.png"}),
    }


def check_everything(found: dict[str, Any]) -> None:
    assert list(found["tools"]) == TOOLS
    for name in ("inspected", "compared"):
        inspection = Inspection.model_validate(found[name].structured_content)
        assert (inspection.score, inspection.map) == (pytest.approx(0.8), None)
        assert text(found[name]) == inspection.details()
    assert found["compared"].structured_content["reference"]["name"] == "bottle"
    assert len(found["compared"].content) == 1
    picture = found["inspected"].content[1]
    assert (picture.type, picture.mime_type) == ("image", "image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(picture.data))).size[0] == 640
    [bottle] = found["references"].structured_content["references"]
    assert bottle == {
        "name": "bottle",
        "version": "9f2c",
        "images": 8,
        "false_alarm_rate": 0.05,
        "promised_rate": pytest.approx(1 / 9),
        "problem": None,
    }
    explained = found["explained"].structured_content
    assert explained["answer"] == "Any defect? 1 pictures, 1 messages."
    assert explained["inspection"]["verdict"] == "anomalous"
    assert explained["inspection"]["reference"]["name"] == "bottle"
    assert found["refused"].is_error
    assert "no such picture in the allowed folders" in text(found["refused"])
    for tool, result in (
        ("inspect_image", "inspected"),
        ("compare_with_reference", "compared"),
        ("list_references", "references"),
        ("explain", "explained"),
    ):
        validate(found[result].structured_content, found["tools"][tool].output_schema)


def test_the_four_tools_work_over_stdio(line: Path, wire: Any) -> None:
    check_everything(over_stdio(line, wire.url, everything))


def test_the_four_tools_work_over_http_with_the_key_and_not_without(
    line: Path, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKTWICE_MCP_KEY", "opensesame\n")  # as a file gives it
    with http_server(line, wire.url) as url:
        check_everything(over_http(url, everything, Authorization="Bearer opensesame"))
        before = len(wire.requests)
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "opensesame"}):
            refused = httpx2.post(url, json={}, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"].startswith("Bearer")
            assert "opensesame" not in refused.text
        assert len(wire.requests) == before


def test_a_page_in_a_browser_cannot_reach_the_server_on_this_machine(line: Path, wire: Any) -> None:
    with http_server(line, wire.url) as url:
        over_http(url, lambda client: client.list_tools())
        assert httpx2.post(url, json={}, headers={"Host": "evil.example"}).status_code == 421
        assert httpx2.post(url, json={}, headers={"Origin": "http://evil"}).status_code == 403


def test_a_request_beyond_the_largest_picture_is_refused_unread(line: Path, wire: Any) -> None:
    with http_server(line, wire.url) as url:
        address = httpx2.URL(url)
        connection = HTTPConnection(address.host, address.port, timeout=30)
        connection.putrequest("POST", address.path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(MAX_BODY + 1))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()
        over_http(url, lambda client: client.list_tools())


def test_a_picture_of_several_megabytes_comes_through_http(line: Path, wire: Any) -> None:
    noise = Image.effect_noise((2600, 2400), 100)
    uri = to_wire(noise)
    assert len(uri) > 5_000_000
    with http_server(line, wire.url) as url:
        asked = {"image": uri, "overlay": False}
        result = over_http(url, lambda client: client.call_tool("inspect_image", asked))
    assert result.structured_content["width"] == 2600


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "out.png", "/etc/passwd", "notes.png", "http://169.254.169.254/", "a\0b"],
)
@pytest.mark.parametrize("tool", ["inspect_image", "explain"])
def test_what_is_closed_or_no_picture_is_refused(
    line: Path, wire: Any, tool: str, name: str
) -> None:
    question = {"question": "What does it say?"} if tool == "explain" else {}
    result = asked(line, tool, image=name, **question)
    assert result.is_error
    assert "swordfish" not in text(result)
    assert "root:" not in text(result)
    assert str(line) not in text(result).replace(name, "")
    assert wire.requests == []


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("url", "http://127.0.0.1:9/v1", "cannot reach the server"),
        ("key", "right", "wants an API key"),
        ("broken", {"inspections": {"data": "?"}}, "not a list of inspections"),
    ],
)
def test_a_server_that_is_down_refuses_or_talks_nonsense_is_said(
    line: Path, wire: Any, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any, said: str
) -> None:
    if setting == "url":
        monkeypatch.setenv("LOOKTWICE_URL", value)
    else:
        setattr(wire, setting, value)
    result = asked(line, "inspect_image", image="part.png")
    assert result.is_error
    assert said in text(result)


def test_an_unknown_reference_and_a_missing_argument_are_said(line: Path, wire: Any) -> None:
    result = asked(line, "compare_with_reference", image="part.png", reference="unknown")
    assert "no reference named unknown" in text(result)
    assert "reference" in text(asked(line, "compare_with_reference", image="part.png"))


def test_words_of_a_model_come_without_control_characters(line: Path, wire: Any) -> None:
    result = asked(line, "explain", image="part.png", question="\x1b[2Jdefect?")
    assert "\x1b" not in text(result)
    assert "\x1b" not in result.structured_content["answer"]


def test_the_network_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOOKTWICE_MCP_KEY", raising=False)
    assert run(["mcp", "--http", "--host", "0.0.0.0"]) == 2
    assert "set $LOOKTWICE_MCP_KEY first" in capsys.readouterr().err


def test_a_blank_key_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOOKTWICE_MCP_KEY", "\n")
    assert run(["mcp", "--http"]) == 2
    assert "$LOOKTWICE_MCP_KEY is blank" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["mcp", "--http", "--port", str(taken.getsockname()[1])]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("looktwice: cannot listen on 127.0.0.1:")


def test_an_ipv6_address_is_told_in_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_mcp, "free_port", lambda host, port: port)

    async def served(*_: object, **__: object) -> None:
        pass

    monkeypatch.setattr(MCPServer, "run_streamable_http_async", served)
    assert run(["mcp", "--http", "--host", "::1"]) == 0
    assert capsys.readouterr().err == "looktwice: MCP on http://[::1]:8100/mcp\n"


def test_port_0_takes_a_free_one_and_tells_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = []

    async def served(*_: object, port: int, **__: object) -> None:
        ports.append(port)

    monkeypatch.setattr(MCPServer, "run_streamable_http_async", served)
    assert run(["mcp", "--http", "--port", "0"]) == 0
    assert ports[0] > 0
    assert f":{ports[0]}/mcp" in capsys.readouterr().err


def test_the_server_ends_with_its_assistant(line: Path) -> None:
    command = [sys.executable, *COMMAND, "--root", str(line)]
    ended = subprocess.run(command, input=b"no JSON\n", capture_output=True, timeout=60)
    assert ended.returncode == 0
    assert b"Traceback" not in ended.stderr


def test_a_folder_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mcp", "--root", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
