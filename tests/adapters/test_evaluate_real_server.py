"""`looktwice evaluate --url` against the real server: the same figures as in process."""

import json

import numpy as np
import pytest
from PIL import Image

from looktwice_clients.cli import run
from tests.serving import Server


def evaluate(capsys, *arguments):
    assert run(["evaluate", *map(str, arguments), "--json", "--draws", "0"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_server_and_the_process_measure_the_same(server: Server, cups, capsys):
    here = evaluate(capsys, cups)
    there = evaluate(capsys, cups, "--url", server.url, "--answers")
    assert here["settings"]["expert"] == there["settings"]["expert"]
    for name, value in here["mean"].items():
        if name.startswith(("image_", "verdict_", "n_")):
            assert there["mean"][name] == pytest.approx(value, abs=1e-6), name
    # The server's map has 256 values, so that pixels tie.
    assert there["mean"]["pixel_auroc"] == pytest.approx(here["mean"]["pixel_auroc"], abs=0.01)
    assert there["mean"]["answer_accuracy"] == there["mean"]["verdict_accuracy"]


def test_questions_are_asked(server: Server, cups, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(cups / "a.png")
    options = {"A": "Yes.", "B": "No."}
    asked = {"Question": "Is there any defect?", "Options": options, "Answer": "A"}
    content = {"a.png": {"conversation": [{**asked, "type": "Anomaly Detection"}]}}
    (cups / "mmad.json").write_text(json.dumps(content))
    found = evaluate(capsys, "--url", server.url, "--questions", cups / "mmad.json")
    assert found["reasoning"]["mmad.json"]["questions"] == 1
