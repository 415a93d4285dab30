"""The README's Python, run as it stands against the real server."""

import re
from pathlib import Path

import pytest

from tests.serving import Server

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


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
