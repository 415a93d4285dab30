"""The README's Python and its commands, run as they stand against the real server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import Server

README = Path(__file__).parents[1] / "README.md"
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


def test_the_commands_of_the_readme_do_what_they_say(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examples = README.parent / "examples"
    (tmp_path / "examples").symlink_to(examples)
    (tmp_path / "line3").mkdir()
    shutil.copy(examples / "plates" / "square_holes.jpg", tmp_path / "line3")
    monkeypatch.setenv("LOOKTWICE_URL", server.url)
    said = {}
    for command in COMMANDS:
        if command not in KEEP_RUNNING:
            ended = subprocess.run(
                f"{sys.executable} -m looktwice_clients {command}",
                shell=True,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, f"{command}: {ended.stderr}"
            said[command] = ended.stdout
    assert set(KEEP_RUNNING) < set(COMMANDS)
    assert len(said) == 7
    *_, added, against = said.values()
    assert "6 images" in added
    assert "anomalous" in against
