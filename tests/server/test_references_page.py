"""docs/references.md: its commands and its Python, run as they stand against the real server."""

import re
import shlex
from pathlib import Path

import pytest

from looktwice_clients.cli import run
from tests.serving import Server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "references.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^\$ looktwice (.*)$", PAGE, re.MULTILINE)


def test_the_commands_of_the_page_tell_the_square_holes_by_their_reference(
    server: Server, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("LOOKTWICE_URL", server.url)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    said = []
    for command in COMMANDS:
        assert run(shlex.split(command)) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    added, without, against, listed, shown, removed = said
    assert "6 images" in added
    assert "promised 14.3%" in added
    assert "normal" in without
    assert "anomalous" in against
    assert any(line.startswith("plates ") for line in listed.splitlines())
    assert shown.startswith("plates, version")
    assert re.search(
        r"6 images, \d+ patches\n.*promised 14.3% \(guaranteed 28.6%\); threshold -\d", shown
    )
    assert (tmp_path / "plates.png").exists()
    assert removed == "removed plates\n"


@pytest.mark.parametrize("block", BLOCKS, ids=("inspector",))
def test_the_python_of_the_page_does_the_same(block: str, server: Server, monkeypatch, capsys):
    monkeypatch.setenv("LOOKTWICE_URL", server.url)
    monkeypatch.chdir(ROOT)
    exec(block, {})
    promised, facts = capsys.readouterr().out.splitlines()
    assert promised.startswith("0.1428")
    assert facts.startswith("anomalous")
    assert "reference plates" in facts
    assert run(["reference", "remove", "plates"]) == 0


@pytest.mark.parametrize("name", re.findall(r"\]\(((?:\.\./)?examples/[^)]+)\)", PAGE))
def test_the_pictures_of_the_page_are_there(name: str):
    assert (ROOT / "docs" / name).is_file()
