"""`make demo` as its recipe runs it, against what the README shows of it."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SCORE = re.compile(r"(?<=score )\d\.\d+")


@dataclass(frozen=True)
class Demo:
    """How a run ended, and where."""

    folder: Path
    exit_code: int
    printed: str
    errors: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One run of the recipe's only line, in a folder of its own."""
    [recipe] = re.findall(r"^demo: setup\n\t(.+)\n\n", (ROOT / "Makefile").read_text(), re.M)
    command = shlex.split(recipe.replace("$(BIN)/python", sys.executable))
    folder = tmp_path_factory.mktemp("demo")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    print(ended.stdout)
    return Demo(folder, ended.returncode, ended.stdout, ended.stderr)


def shown(text: str) -> list[str]:
    """The lines of a run, without its port, its seconds and what lies between runs."""
    text = re.sub(r"(?<=--port )\d+", "PORT", re.sub(r"\d+(?= s$)", "N", text, flags=re.M))
    return SCORE.sub("SCORE", text).strip().splitlines()


def test_the_demo_ends_well_and_quietly(demo: Demo) -> None:
    assert (demo.exit_code, demo.errors) == (0, "")


def test_the_demo_prints_what_the_readme_shows(demo: Demo) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    [block] = re.findall(r"```console\n\$ make demo\n(.*?)\$ make test", readme, re.DOTALL)
    assert shown(demo.printed) == shown(block)
    scores = [[float(score) for score in SCORE.findall(text)] for text in (demo.printed, block)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


@pytest.mark.parametrize("name", ["good", "scratched"])
def test_the_demo_writes_a_readable_overlay_of_each_part(demo: Demo, name: str) -> None:
    with Image.open(demo.folder / "out" / f"{name}_overlay.png") as overlay:
        overlay.load()
    with Image.open(ROOT / "examples" / f"{name}.png") as part:
        assert overlay.width >= part.width
        assert overlay.height > part.height  # the verdict stands below
