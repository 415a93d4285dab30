"""AnomalyGPT's training: lessons as the server sees pictures, resumable steps, a file."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.functional import normalize
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from looktwice_adapters.detector import Detector
from looktwice_adapters.scenes import PictureLibrary
from looktwice_adapters.towers import TowerConfig
from looktwice_adapters.train import decoder as training
from looktwice_adapters.train import lessons as lesson_files
from looktwice_adapters.train.decoder import (
    DecoderTraining,
    Pupil,
    conversations,
    levels_of,
    train_decoder,
    undecided,
)
from looktwice_adapters.train.features import keep_plan
from looktwice_adapters.train.lessons import Towers, make_lessons, places
from looktwice_adapters.train.run import Run, Schedule, TrainingError
from looktwice_adapters.train.sequences import IGNORED, SequenceWriter
from looktwice_adapters.train.tokenizer import kept_tokenizer

NANO = Path(__file__).parents[2] / "models" / "nano"
SMALL = (2, 4, 4, 8, 8)
TRAINING = DecoderTraining(pairs=1, channels=SMALL)


@pytest.fixture(scope="module")
def towers():
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32)
    return Towers(Detector.from_folder(NANO), model.eval())


@pytest.fixture(scope="module")
def lessons(towers, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson_files, "PAIRS", 2)
        return make_lessons(towers, PictureLibrary(), tmp_path_factory.mktemp("lessons"), 2, 0)


@pytest.fixture(scope="module")
def writer():
    return SequenceWriter(kept_tokenizer(NANO))


def fresh_parts(towers):
    torch.manual_seed(0)
    sizes = towers.detector.expert.config.level_sizes
    config = AnomalyGPTConfig(sizes, 64, 256, "drawn", "0123", channels=SMALL)
    both = normalize(torch.randn(2, 64), dim=-1)
    text = torch.stack((both[0], both[0] + 0.3 * both[1]))  # alike, as a text tower's are
    return AnomalyGPT(config, normalize(text, dim=-1))


def trained(towers, lessons, writer, folder, steps, resume=False):
    schedule = Schedule(steps, 1e-3, warmup=1, save_every=2, log_every=1)
    pupil = Pupil(fresh_parts(towers), towers, writer)
    return train_decoder(pupil, lessons, TRAINING, schedule, folder, resume)


def test_lessons_are_pairs_whose_second_is_defective(lessons):
    assert [bool(lesson.places) for lesson in lessons] == [False, True] * 2
    for lesson in lessons:
        assert bool(lesson.cover.any()) == bool(lesson.places)
        assert len(lesson.cover) == len(lesson.stages[0])


def test_image_tokens_are_those_of_transformers(towers):
    picture = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    lesson = towers.lesson(picture, np.zeros((300, 200), bool), np.random.default_rng(0))
    crops = (towers.detector.anyres.crops(picture).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        features = towers.model.model.get_image_features(crops[None], torch.tensor([[300, 200]]))
    expected = torch.cat(list(getattr(features, "pooler_output", features)))
    torch.testing.assert_close(lesson.image.float(), expected, atol=0.02, rtol=0.02)


def test_places_are_the_masks_parts_the_largest_first():
    mask = np.zeros((90, 60), bool)
    mask[5:10, 5:10] = mask[70:85, 45:58] = True
    assert places(mask) == ("bottom right", "top left")
    assert places(np.zeros((9, 9), bool)) == ()


def test_answers_are_true_and_only_they_are_supervised(towers, lessons, writer):
    parts = fresh_parts(towers)
    counts = [len(lesson.cover) for lesson in lessons]
    with torch.no_grad():
        output = parts(*levels_of(towers.detector.expert, lessons), counts)
    for seed in range(10):
        rng = random.Random(seed)
        for sequence, lesson in zip(
            conversations(lessons, output, writer, rng), lessons, strict=True
        ):
            said = writer.tokenizer.decode([i for i in sequence.labels if i != IGNORED])
            assert ("nothing unusual" in said or "looks normal" in said) != bool(lesson.places)
            assert "Inspection:" not in writer.tokenizer.decode(sequence.ids)  # no facts to read
            slots = sequence.ids.count(writer.image)
            assert slots == len(lesson.image) + 18


def test_fresh_adapters_start_undecided(towers, lessons):
    parts = fresh_parts(towers)
    levels, _ = levels_of(towers.detector.expert, lessons)
    before = parts.decoder(levels).logit().abs().median()
    undecided(parts.decoder)
    assert parts.decoder(levels).logit().abs().median() < 0.1 * before


def test_a_resumed_run_equals_an_uninterrupted_one(towers, lessons, writer, tmp_path, monkeypatch):
    before = {name: value.clone() for name, value in towers.model.state_dict().items()}
    whole = trained(towers, lessons, writer, tmp_path / "whole", 4)
    update = Run.update

    def power_cut(self, inputs_at):
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self, inputs_at)

    monkeypatch.setattr(Run, "update", power_cut)
    with pytest.raises(KeyboardInterrupt):
        trained(towers, lessons, writer, tmp_path / "parts", 4)
    monkeypatch.setattr(Run, "update", update)
    again = trained(towers, lessons, writer, tmp_path / "parts", 4, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in towers.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the language model is frozen


def test_a_run_with_another_language_model_is_not_resumed(towers, lessons, writer, tmp_path):
    trained(towers, lessons, writer, tmp_path, 0)
    other = copy.deepcopy(towers.model)
    with torch.no_grad():
        next(other.model.language_model.parameters())[0] += 0.01
    with pytest.raises(TrainingError, match=r"other options \(model\)"):
        trained(Towers(towers.detector, other), lessons, writer, tmp_path, 1, resume=True)


def test_training_brings_the_map_to_the_defects_and_the_loss_down(
    towers, lessons, writer, tmp_path
):
    lessons = lessons[:2]
    parts = trained(towers, lessons, writer, tmp_path, 12)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        levels, _ = levels_of(towers.detector.expert, lessons)
        found = parts.decoder.zero_shot_map(levels)
    covered = torch.cat([lesson.cover for lesson in lessons]) > 0.5
    assert found[covered].mean() > 1.5 * found[~covered].mean()


def test_the_command_writes_a_decoder_that_fits_its_checkpoint(tmp_path, monkeypatch):
    def drawn_text(name, weights):
        assert (name, weights) == ("ViT-B-32", None)
        return lambda texts: torch.randn(len(texts), 8)

    monkeypatch.setattr(training, "open_clip_encoder", drawn_text)
    monkeypatch.setattr(training, "DecoderTraining", lambda seed: TRAINING)
    monkeypatch.setattr(lesson_files, "PAIRS", 1)
    flags = ["--text-weights", "untrained", "--pairs", "1", "--steps", "1"]
    result = CliRunner().invoke(
        training.decoder, ["--model", str(NANO), "--out", str(tmp_path), *flags]
    )
    assert result.exit_code == 0, result.output
    detector = Detector.from_folder(NANO, tmp_path / "decoder.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (120, 90, 3), np.uint8)
    assert 0 <= detector.judge(picture).score <= 1
    assert detector.judging.config.text_tower == "ViT-B-32 untrained"
    plan = json.loads((tmp_path / "lessons" / "plan.json").read_text())
    assert isinstance(plan["model"], int)  # hash of its weights, of which lessons are made too


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--text-tower", "ViT-Z"], "no text tower ViT-Z with weights laion2b_s34b_b79k: "),
        (["--text-weights", "{tmp}/config.json"], "`untrained`"),
        (["--text-weights", "untrained", "--model", "{tmp}"], "has no section anomaly_expert"),
        (
            ["--text-weights", "untrained", "--pictures", "{tmp}"],
            "made with different settings (expert, pictures",
        ),
    ],
)
def test_what_cannot_train_is_said_in_one_line(tmp_path, flags, says):
    (tmp_path / "config.json").write_text("{}")
    keep_plan(tmp_path / "lessons", {"expert": "0123", "pictures": None})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (130, 130, 3), np.uint8)).save(
        tmp_path / "x.png"
    )
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    arguments = ["--model", str(NANO), "--out", str(tmp_path), *flags]
    result = CliRunner().invoke(training.decoder, arguments)
    assert result.exit_code == 1
    assert says in result.output.splitlines()[-1]


def test_an_expert_on_the_language_models_tower_is_refused_before_lessons(tmp_path, monkeypatch):
    published = SimpleNamespace(expert=SimpleNamespace(config=SimpleNamespace(tower=TowerConfig())))
    monkeypatch.setattr(training, "open_clip_encoder", lambda *_: None)
    monkeypatch.setattr(training, "text_features", lambda _: torch.zeros(2, 4))
    monkeypatch.setattr(Detector, "from_folder", lambda _: published)
    ended = CliRunner().invoke(training.decoder, ["--out", str(tmp_path / "out")])
    assert ended.exit_code == 1
    assert "looks through the language model's tower" in ended.output
    assert not (tmp_path / "out").exists()
