"""Distilling the LLM's tower: it learns its teacher's features, and resumes to the same end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice_adapters.datasets import read_image
from looktwice_adapters.towers import TimmTower, lite0_weights, load_lite0
from looktwice_adapters.train import tower as module
from looktwice_adapters.train.options import content
from looktwice_adapters.train.run import Run, Schedule, TrainingError
from looktwice_adapters.train.tower import TEACHER, TowerTraining, read_pictures, train_tower
from looktwice_clients.cli import run as looktwice


@pytest.fixture
def small(monkeypatch):
    """A student of two layers, steps of two views, a checkpoint after every step."""
    training = TowerTraining(layers=2, hidden_size=48, heads=1, taps=(1, 1, 2), batch=2)
    monkeypatch.setattr(module, "TowerTraining", lambda seed: replace(training, seed=seed))
    monkeypatch.setattr(
        module, "Schedule", lambda steps: Schedule(steps, warmup=1, save_every=1, log_every=1)
    )


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1) for _ in range(4)]


@pytest.fixture
def teacher():
    tower = TimmTower(TEACHER)
    load_lite0(tower, lite0_weights())
    return tower


def test_a_resumed_run_equals_an_uninterrupted_one(small, pictures, teacher, tmp_path, monkeypatch):
    whole = train_tower(pictures, teacher, tmp_path / "whole", 3, False)
    update = Run.update

    def interrupted(self, inputs_at):
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self, inputs_at)

    monkeypatch.setattr(Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tower(pictures, teacher, tmp_path / "parts", 3, False)
    monkeypatch.setattr(Run, "update", update)
    again = train_tower(pictures, teacher, tmp_path / "parts", 3, True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    losses = [json.loads(line)["loss"] for line in (tmp_path / "parts" / "log.jsonl").open()]
    assert len(losses) == 3


def test_another_seed_gives_another_tower(small, pictures, teacher, tmp_path):
    first = train_tower(pictures, teacher, tmp_path / "0", 1, False)
    other = train_tower(pictures, teacher, tmp_path / "1", 1, False, seed=1)
    weights = (tower.state_dict()["encoder.layers.0.mlp.fc1.weight"] for tower in (first, other))
    assert not torch.equal(*weights)
    kept = torch.load(tmp_path / "1" / "checkpoint.pt", weights_only=True)["settings"]
    assert (kept["seed"], kept["pictures"]) == (1, content(pictures))


def test_a_run_on_other_pictures_or_of_another_teacher_is_not_resumed(
    small, pictures, teacher, tmp_path
):
    train_tower(pictures, teacher, tmp_path, 1, False)
    others = [*pictures[1:], 255 - pictures[0]]
    with pytest.raises(TrainingError, match=r"other options \(pictures\)"):
        train_tower(others, teacher, tmp_path, 1, True)
    next(teacher.network.parameters()).data.mul_(1.1)
    with pytest.raises(TrainingError, match=r"\(teacher\)"):
        train_tower(pictures, teacher, tmp_path, 1, True)


def test_the_command_takes_the_packaged_teacher_and_writes_a_siglip_tower(
    small, pictures, tmp_path
):
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    options = ["--pictures", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    assert looktwice(["train", "tower", *options, "--steps", "1"]) == 0
    written = json.loads((tmp_path / "out" / "tower.json").read_text())
    assert written["hidden_size"] == 48
    assert (tmp_path / "out" / "tower.safetensors").exists()


def test_a_folder_without_pictures_is_one_line(tmp_path, capsys):
    options = ["--pictures", str(tmp_path), "--out", str(tmp_path / "out")]
    assert looktwice(["train", "tower", *options]) == 1
    assert "no pictures of 128 pixels or more" in capsys.readouterr().err


def test_training_sees_the_pixels_that_the_server_sees(tmp_path):
    levels = np.tile(np.linspace(0, 65535, 160).astype(np.uint16), (160, 1))
    Image.fromarray(levels).save(tmp_path / "deep.png")
    [seen] = read_pictures(tmp_path, limit=9, side=160, smallest=128)
    assert seen.tolist() == read_image(tmp_path / "deep.png").tolist()
    assert seen.std() > 50  # converted by Pillow itself, all but the first column is white
