"""The official `openai` npm package against the real server: the wire is not Python's alone."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from looktwice_clients import Inspection, Inspector
from tests.serving import Server

NODE = Path(__file__).parent / "node"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
GOOD, SCRATCHED = EXAMPLES / "good.png", EXAMPLES / "scratched.png"


@pytest.fixture(scope="module")
def node_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program beside a `node_modules` that npm has just filled."""
    folder = tmp_path_factory.mktemp("node") / "program"
    shutil.copytree(NODE, folder, ignore=shutil.ignore_patterns("node_modules"))
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    subprocess.run(install, cwd=folder, check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def said(node_program: Path, server: Server) -> dict[str, Any]:
    """What the program printed."""
    command = ["node", "ask.mjs", server.url, str(GOOD), str(SCRATCHED)]
    run = subprocess.run(command, cwd=node_program, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_chat_carries_the_same_facts_to_node_and_to_python(
    said: dict[str, Any], server: Server
) -> None:
    with Inspector(server.url) as inspector:
        expected = inspector.inspect(SCRATCHED)
    [received] = [Inspection.model_validate(one) for one in said["chat"]["inspections"]]
    assert (received.verdict, received.regions) == ("anomalous", expected.regions)
    assert received.score == pytest.approx(expected.score, abs=1e-5)
    assert received.map == expected.map
    assert said["chat"]["text"]


def test_several_pictures_have_an_inspection_each_in_order(said: dict[str, Any]) -> None:
    inspections = said["several"]["inspections"]
    assert [(one["image"], one["verdict"]) for one in inspections] == [
        (0, "normal"),
        (1, "anomalous"),
    ]


def test_a_stream_ends_with_the_whole_answer_and_its_inspections(said: dict[str, Any]) -> None:
    assert said["streamed"]["text"] == said["chat"]["text"]
    assert [one["verdict"] for one in said["streamed"]["inspections"]] == ["anomalous"]


def test_a_refusal_is_the_sdks_own_error(said: dict[str, Any]) -> None:
    assert (said["refusal"]["name"], said["refusal"]["status"]) == ("BadRequestError", 400)
    assert "inspection.map should be true or false" in said["refusal"]["message"]


def test_the_docs_block_for_node_runs_as_it_stands(node_program: Path, server: Server) -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    [block] = re.findall(r"```javascript\n(.*?)```", page, re.DOTALL)
    program = node_program / "block.mjs"
    program.write_text(block.replace("http://127.0.0.1:8000/v1", server.url))
    run = subprocess.run(["node", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("anomalous")
