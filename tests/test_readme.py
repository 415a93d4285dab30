"""The README's Python and its commands, run as they stand against the real server."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.serving import Server

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = README.parent / "examples"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
COMMANDS = re.findall(
    r"^\$ \.venv/bin/looktwice (.*?)(?: +#.*)?$", README.read_text(), re.MULTILINE
)
KEEP_RUNNING = ["serve", "chatbot"]
"""Every test asks the one; tests/system opens the other in a browser."""


@pytest.mark.parametrize("block", BLOCKS, ids=("inspector", "openai"))
def test_block_of_the_readme_finds_the_scratch(
    block: str, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(README.parent)
    monkeypatch.setenv("LOOKTWICE_URL", server.url)
    exec(block.replace("http://127.0.0.1:8000/v1", server.url), {})
    printed = capsys.readouterr().out
    assert "anomalous" in printed
    assert "right" in printed


@dataclass(frozen=True)
class Ran:
    """What the commands printed, and the folder in which they ran."""

    folder: Path
    said: dict[str, str]

    def printed(self, beginning: str) -> str:
        """By the one command that begins like this."""
        [text] = [text for command, text in self.said.items() if command.startswith(beginning)]
        return text


@pytest.fixture(scope="module")
def ran(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The commands that end by themselves, each once, in order; `chat` is asked a question."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(EXAMPLES)
    (folder / "line3").mkdir()
    shutil.copy(EXAMPLES / "plates" / "square_holes.jpg", folder / "line3")
    said = {}
    for command in COMMANDS:
        if command not in KEEP_RUNNING:
            ended = subprocess.run(
                f"{sys.executable} -m looktwice_clients {command}",
                shell=True,
                cwd=folder,
                input="Is there a defect?\n" if command.startswith("chat") else "",
                capture_output=True,
                text=True,
                env=os.environ | {"LOOKTWICE_URL": server.url},
            )
            assert ended.returncode == 0, f"{command}: {ended.stderr}"
            said[command] = ended.stdout
    return Ran(folder, said)


def test_the_commands_of_the_readme_end_well(ran: Ran) -> None:
    assert set(KEEP_RUNNING) < set(COMMANDS)
    assert len(ran.said) == 7


def test_the_readmes_inspection_of_a_folder_is_a_line_and_an_overlay_each(ran: Ran) -> None:
    pictures = [path for path in EXAMPLES.rglob("*") if path.suffix in {".png", ".jpg"}]
    _, *lines = ran.printed("inspect examples/ ").splitlines()
    assert len(lines) == len(pictures)
    overlays = {path.stem: path for path in (ran.folder / "out").glob("*.png")}
    assert overlays.keys() == {path.stem for path in pictures}
    for overlay in overlays.values():
        with Image.open(overlay) as picture:
            picture.load()


def test_the_readmes_line_for_scripts_is_json(ran: Ran) -> None:
    found = json.loads(ran.printed("inspect line3/*.jpg"))
    assert (found["path"], found["verdict"]) == ("line3/square_holes.jpg", "normal")


def test_the_readmes_report_is_a_table_and_a_page_with_the_overlay(ran: Ran) -> None:
    with (ran.folder / "out" / "report.csv").open(encoding="utf-8-sig", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["picture"], row["verdict"]) == ("line3/square_holes.jpg", "normal")
    page = (ran.folder / "out" / "report.html").read_text("utf-8")
    assert "line3/square_holes.jpg" in page
    assert page.count("data:image/jpeg;base64,") == 1


def test_the_readmes_conversation_answers_and_shows_the_facts(ran: Ran) -> None:
    answer, facts = ran.printed("chat ").splitlines()
    assert answer.startswith("Yes")
    assert "right" in answer
    assert facts.startswith("[examples/scratched.png: anomalous, score ")


def test_the_readmes_reference_is_made_of_its_pictures_and_shows_what_differs(ran: Ran) -> None:
    assert "6 images" in ran.printed("reference add plates ")
    assert "anomalous" in ran.printed("inspect examples/plates/*.jpg ")
