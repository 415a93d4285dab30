"""A shipped checkpoint is taught more, and put together again with its own tower and expert."""

import shutil
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.train import nano_assistant as training
from looktwice_adapters.train.nano import nano

NANO = Path(__file__).parents[2] / "models" / "nano"


def run(command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_one_step_more_moves_the_language_model_a_little_and_nothing_else(tmp_path, monkeypatch):
    measure = training.measure
    monkeypatch.setattr(
        training, "measure", lambda reply, _, stated: measure(reply, 1, stated=stated)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(pixels).save(pictures / "noise.png")
    steps = ("--text-steps", 1, "--picture-steps", 1, "--looks", 1, "--choices", 0.5)
    taught, out = tmp_path / "taught", tmp_path / "nano"
    run(
        training.nano_assistant,
        *("--start-from", NANO, "--pictures", pictures, "--out", taught, *steps),
    )
    shutil.copytree(NANO, out)
    run(nano, "--assistant", taught, "--expert", NANO / "expert.safetensors", "--out", out)

    before, after = (load_file(folder / "model.safetensors") for folder in (NANO, out))
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert not any(name.startswith("vision_tower.") for name in moved)
    for name in moved:
        torch.testing.assert_close(before[name], after[name], atol=5e-3, rtol=0.02, msg=name)
    for path in NANO.iterdir():
        if path.name not in ("model.safetensors", "SHA256SUMS"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_looks_of_other_pictures_are_refused_before_training(tmp_path):
    began = {"tower": None, "start-from": file_hash(NANO / "model.safetensors")}
    made_of = {"pictures": str(tmp_path), "looks": 2, "seed": 0, **began}
    parts = [(torch.zeros(2, 4, 3), (28, 28), (1, 1))] * 2
    torch.save({"of": made_of, "looks": parts}, tmp_path / "looks.pt")
    assert len(training.read_looks(tmp_path / "looks.pt", made_of)) == 2
    options = ("--start-from", NANO, "--pictures", NANO, "--looks", 3, "--out", tmp_path)
    result = CliRunner().invoke(training.nano_assistant, [*map(str, options), "--resume"])
    assert result.exit_code == 1
    assert "made with other --pictures, --looks: choose another --out" in str(result.exception)
    torch.save({"of": made_of | {"start-from": "0"}, "looks": parts}, tmp_path / "looks.pt")
    result = CliRunner().invoke(training.nano_assistant, [*map(str, options), "--resume"])
    assert "made with other --pictures, --looks, --start-from:" in str(result.exception)
    assert not (tmp_path / "text").exists()


def test_without_a_tower_there_must_be_a_checkpoint(tmp_path):
    folders = ("--pictures", tmp_path, "--out", tmp_path / "out")
    result = CliRunner().invoke(training.nano_assistant, [str(part) for part in folders])
    assert result.exit_code == 2
    assert "--tower FOLDER" in result.output
