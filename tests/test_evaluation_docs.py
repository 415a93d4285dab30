"""docs/evaluation.md: its commands exist, and the drawn data set is measured as it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

from looktwice_adapters.evaluate.command import evaluate
from looktwice_adapters.metrics import Metrics
from looktwice_clients.cli import run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "evaluation.md").read_text()


def test_every_option_that_the_page_names_exists():
    known = {name for option in evaluate.params for name in option.opts}
    lines = re.findall(r"looktwice evaluate (.*)", TEXT)
    named = set(re.findall(r"(--[a-z]+)", " ".join(lines)))
    assert len(named) > 5
    assert named <= known


def test_every_figure_is_explained():
    for name in vars(Metrics()):
        assert name in TEXT or f"`_{name.rpartition('_')[2]}`" in TEXT, name


def test_the_drawn_data_set_can_be_measured(tmp_path, capsys):
    script = ROOT / "benchmarks" / "drawn_dataset.py"
    command = [sys.executable, str(script), str(tmp_path / "drawn")]
    subprocess.run([*command, "--normal", "4", "--defective", "1"], check=True)
    assert run(["evaluate", str(tmp_path / "drawn"), "--json", "--draws", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["categories"]) == {"drawn/part", "drawn/sheet", "drawn/panel"}
    assert found["mean"]["pixel_auroc"] > 0.7
