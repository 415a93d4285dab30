"""docs/evaluation.md: its commands run, and the drawn data set measures as the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from looktwice_adapters.evaluate.command import evaluate
from looktwice_adapters.metrics import Metrics
from tests.adapters.scripted_server import completion, scripted_server
from tests.serving import Server

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "evaluation.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in re.findall(r"^\$ (.*?)(?: +#.*)?$", block, re.M)]
DONE = ["pip install '.[evaluate]'", "looktwice serve &"]
"""By `make setup`, and by the suite's one server."""

DRAW, *COMMANDS = [line for line in LINES if line not in DONE]
ROW = re.compile(r"^(?:(.+?): )?(\S+)((?: +(?:[\d.]+|-)){12,14})$", re.MULTILINE)
"""Of a table: who judged where there are several, the product, its figures."""


def test_every_option_that_the_page_names_exists():
    known = {name for option in evaluate.params for name in option.opts}
    lines = re.findall(r"looktwice evaluate (.*)", TEXT)
    named = set(re.findall(r"(--[a-z]+)", " ".join(lines)))
    assert len(named) > 5
    assert named <= known


def test_every_figure_is_explained():
    for name in vars(Metrics()):
        assert name in TEXT or f"`_{name.rpartition('_')[2]}`" in TEXT, name


def in_shell(command: str, folder: Path) -> str:
    """What the command prints, in a folder that has the checkout's benchmarks."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=os.environ | {"PATH": programs},
        text=True,
        capture_output=True,
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def table(text: str) -> dict[tuple[str, str], list[float | None]]:
    """Judge and product -> the figures of a printed table."""
    return {
        (judge, product): [None if figure == "-" else float(figure) for figure in figures.split()]
        for judge, product, figures in ROW.findall(text)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


def test_the_drawn_data_set_measures_as_the_page_says(folder: Path):
    in_shell(DRAW, folder)
    found = table(in_shell(COMMANDS[0], folder))
    said = table(BLOCKS[0])
    assert len(said) == 4
    assert found.keys() == said.keys()
    for row, figures in said.items():  # one picture of 36 is the machine's; their numbers are not
        assert found[row] == pytest.approx(figures, abs=3), row
        assert found[row][-2:] == figures[-2:], row
    written = {path.name for path in (folder / "report").iterdir()}
    assert {"metrics.json", "metrics.csv", "images.csv", "report.html"} <= written


@pytest.fixture
def small(folder: Path) -> Path:
    """A small drawn data set under every name; beside it a question of each kind."""
    in_shell(f"{DRAW} --normal 8 --defective 1", folder)
    for name in ("mine", "MMAD", "VisA_DR"):
        (folder / name).symlink_to(folder / "drawn")
    picture = "part/test/scratch/000.png"
    one = {
        "type": "Anomaly Detection",
        "Question": "Is there any defect in the object?",
        "Options": {"A": "Yes.", "B": "No."},
        "Answer": "A",
    }
    (folder / "mmad.json").write_text(json.dumps({picture: {"conversation": [one]}}))
    two = {"image": picture, "questions": ["What is wrong here?"], "answers": ["It is scratched."]}
    (folder / "visa_dr.json").write_text(json.dumps([two]))
    return folder


@pytest.mark.parametrize("line", COMMANDS[1:])
def test_the_commands_end_well(line: str, small: Path, server: Server):
    with scripted_server(lambda *_: (200, completion("8/10"))) as marker:
        here = line.replace("http://127.0.0.1:8000/v1", server.url)
        here = here.replace("http://127.0.0.1:9000/v1", marker.url)
        printed = in_shell(f"{here} --draws 20", small)
    assert len(marker.bodies("/v1/chat/completions")) == line.count("--judge")
    if "--questions" in line:
        assert re.search(r"^(mmad|visa_dr)\.json", printed, re.MULTILINE), printed
        assert ("1 of 1 questions against references" in printed) is ("--shots" in line)
    else:
        found = table(printed)
        assert len(found) == 4 * (1 + line.count("--baseline")), printed
        assert all(figures[0] is not None for figures in found.values()), printed
