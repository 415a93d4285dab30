"""docs/clients.md, section by section: its blocks run as they stand against the real server.

In Python `# -> text` says what the block prints; below a `$ command` stands what it prints. Node's
block is run by tests/system.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

# At the top: it binds standard error when it is imported, and capsys' has no file descriptor.
from mcp import Client, StdioServerParameters

from looktwice_clients import Inspector
from tests.serving import Server, free_port

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clients.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    section.partition("\n")[0]: BLOCK.findall(section)
    for section in PAGE.read_text().split("\n## ")
    if BLOCK.search(section)
}
KEEPS_RUNNING = "  # keeps running"


class ToolCallingModel(BaseHTTPRequestHandler):
    """Chat completions of a model that inspects every picture it is told of, then remarks."""

    keys: ClassVar[set[str | None]] = set()  # that requests came with

    def do_POST(self) -> None:
        self.keys.add(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = body["messages"]
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if messages[-1]["role"] == "tool":
            message["content"] = (
                "Picture 2 needs a person's eye: the tool found one region on the right."
            )
        else:
            task = messages[-1]["content"]
            names = re.findall(r"picture-\d+", task)
            [reference] = re.findall(r"Reference: (\w+)", task)
            compared = {} if reference == "none" else {"reference": reference}
            message["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {
                        "name": "inspect_image",
                        "arguments": json.dumps({"image": name} | compared),
                    },
                }
                for name in names
            ]
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        content = json.dumps(reply | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def tool_calling_model() -> Iterator[int]:
    """The port on which it listens."""
    ToolCallingModel.keys.clear()
    server = HTTPServer(("127.0.0.1", 0), ToolCallingModel)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def checkout(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout, in which blocks may write."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOOKTWICE_URL", server.url)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def here(
    server: Server, tool_calling_model: int, request: pytest.FixtureRequest
) -> Callable[[str], str]:
    """The page's addresses -> those of this run."""
    ports = {
        "127.0.0.1:8000": server.root.partition("//")[2],
        "127.0.0.1:8001": f"127.0.0.1:{tool_calling_model}",
        "8100": str(free_port()),
    }

    def replaced(code: str) -> str:
        for written, real in ports.items():
            code = code.replace(written, real)
        return code

    return replaced


@pytest.mark.server
@pytest.mark.parametrize("section", SECTIONS)
def test_the_blocks_of_a_section_do_what_they_say(
    section: str,
    checkout: Path,
    here: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    running: list[subprocess.Popen[bytes]] = []
    try:
        for language, code in SECTIONS[section]:
            if language == "python":
                exec(compile(here(code), f"{PAGE.name}: {section}", "exec"), {"__name__": "block"})
                printed = capsys.readouterr().out
                for text in re.findall(r"# -> (.+)$", code, re.MULTILINE):
                    assert text in printed
            elif language == "console":
                running += console(here(code))
            elif language == "json":
                asyncio.run(configuration(here(code)))
            else:
                assert language == "javascript", f"nothing runs a block of {language}"
    finally:
        for process in running:
            process.terminate()
            process.wait(30)


@pytest.mark.server
def test_the_agents_program_compares_with_a_reference_and_sends_its_key(
    checkout: Path, tool_calling_model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_API_KEY", "a key of the plant")
    with Inspector() as inspector:
        inspector.references.add("agents", sorted((ROOT / "examples/plates/good").iterdir()))
        command = [sys.executable, "examples/shift_agent.py", "examples/plates"]
        model = ["--model-url", f"http://127.0.0.1:{tool_calling_model}/v1", "--model", "MODEL"]
        ended = subprocess.run(
            [*command, *model, "--reference", "agents"], text=True, capture_output=True, check=True
        )
        inspector.references.remove("agents")
    [row] = [line for line in ended.stdout.splitlines() if line.startswith("| square")]
    assert "anomalous" in row
    assert "reference agents" in row
    assert "NOT" not in ended.stdout
    assert ToolCallingModel.keys == {"Bearer a key of the plant"}


def console(code: str) -> list[subprocess.Popen[bytes]]:
    """Run the commands of a block and compare what they print; those that keep running."""
    running = []
    for part in code.removeprefix("$ ").split("\n$ "):
        command, _, said = part.partition("\n")
        if command.endswith(KEEPS_RUNNING):
            plain = command.removesuffix(KEEPS_RUNNING)
            running.append(subprocess.Popen(f"exec env {plain}", shell=True))
            wait_for(int(command.partition("--port ")[2].split()[0]))
            continue
        ended = subprocess.run(
            command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert ended.returncode == 0, ended.stdout
        # Lines of stdout and stderr may change places; blank ones separate.
        lines = {line for line in said.splitlines() if line}
        assert lines == {line for line in ended.stdout.splitlines() if line}
    return running


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)


async def configuration(code: str) -> None:
    """Start the servers of an assistant's configuration as it would, and list their tools."""
    for entry in json.loads(code)["mcpServers"].values():
        async with Client(StdioServerParameters(**entry)) as client:
            tools = (await client.list_tools()).tools
            assert [tool.name for tool in tools] == [
                "inspect_image",
                "compare_with_reference",
                "list_references",
                "explain",
            ]


def test_every_block_of_the_page_is_in_a_section_and_no_link_of_it_is_dead() -> None:
    text = PAGE.read_text()
    assert sum(map(len, SECTIONS.values())) == len(BLOCK.findall(text)) == text.count("```") // 2
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\((.+?)\)", text):
        path, _, anchor = target.partition("#")
        assert (PAGE.parent / path).exists() if path else anchor in headings
