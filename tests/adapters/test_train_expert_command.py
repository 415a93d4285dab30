"""`looktwice train expert`: what trains, what is left out, what is held out, what is refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice_adapters.detector import Detector
from looktwice_adapters.scenes import PictureLibrary
from looktwice_adapters.towers import lite0_weights
from looktwice_adapters.train import expert as module
from looktwice_adapters.train.features import (
    ShardPlan,
    draw_pair,
    make_shard,
    make_shards,
    read_shard,
)
from looktwice_clients.cli import run as looktwice

NANO = Path(__file__).parents[2] / "models" / "nano"


def write_set(folder, masks=True):
    """Three even plates and three with a dark square, in MVTec AD's layout."""
    rng = np.random.default_rng(0)
    for split, kind in (("train", "good"), ("test", "good"), ("test", "square")):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            picture = rng.integers(140, 160, (80, 80, 3)).astype(np.uint8)
            mask = np.zeros((80, 80), np.uint8)
            if kind == "square":
                mask[20:50, 10 + 10 * number : 40 + 10 * number] = 255
                picture[mask > 0] //= 4
            Image.fromarray(picture).save(folder / split / kind / f"{number}.png")
            if kind == "square" and masks:
                truth = folder / "ground_truth" / kind
                truth.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(truth / f"{number}_mask.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    broken = write_set(root / "broken")
    for path in broken.rglob("*.png"):
        path.write_bytes(b"not a picture")
    return write_set(root / "plates"), broken


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two pairs instead of 64, in this process; their plans."""
    plans = []

    def few(plan, count, workers):
        plans.append(plan)
        plan.folder.mkdir(parents=True, exist_ok=True)
        return [make_shard(replace(plan, pairs=2), number) for number in range(count)]

    monkeypatch.setattr(module, "make_shards", few)
    return plans


def train(out, *options):
    fixed = ["--shards", "2", "--steps", "2", "--out", str(out)]
    return looktwice(["train", "expert", *fixed, *map(str, options)])


def test_a_set_that_is_left_out_neither_trains_nor_calibrates(sets, tmp_path, small_shards, capsys):
    plates, broken = sets
    third = write_set(tmp_path / "third")
    options = [
        "--data",
        plates,
        "--data",
        broken,
        "--calibrate-on",
        broken,
        "--calibrate-on",
        third,
    ]
    assert train(tmp_path / "all", *options, "--leave-out", "plates") == 2
    assert "calibrate on another set" in capsys.readouterr().err

    assert train(tmp_path / "no-broken", *options, "--leave-out", "broken") == 0
    record = json.loads((tmp_path / "no-broken" / "training.json").read_text())
    assert record["data"] == [str(plates)]
    assert record["calibrated_on"] == [str(third)]
    assert record["left_out"] == ["broken"]
    section = json.loads((tmp_path / "no-broken" / "expert.json").read_text())
    assert section["calibration"]["map_scale"] != 1.0


def test_a_set_without_masks_calibrates_the_score_and_keeps_the_maps_scale(tmp_path, small_shards):
    unmarked = write_set(tmp_path / "unmarked", masks=False)
    assert train(tmp_path / "out", "--calibrate-on", unmarked) == 0
    fitted = json.loads((tmp_path / "out" / "expert.json").read_text())["calibration"]
    assert fitted["map_scale"] == 1.0
    assert fitted["map_bias"] != 0.0
    assert fitted["score_scale"] != 1.0


def test_a_checkpoint_is_calibrated_on_pictures_of_ones_own(tmp_path, capsys):
    checkpoint = tmp_path / "nano"
    shutil.copytree(NANO, checkpoint)
    before = json.loads((checkpoint / "config.json").read_text())
    mine = write_set(tmp_path / "mine")
    asked = ["train", "calibrate", str(checkpoint), "--calibrate-on", str(mine)]
    assert looktwice(asked) == 0
    after = json.loads((checkpoint / "config.json").read_text())
    fitted = after["anomaly_expert"].pop("calibration")
    given = before["anomaly_expert"].pop("calibration")
    assert fitted["score_bias"] != given["score_bias"]
    assert fitted["normal_scores"] == given["normal_scores"]  # three good pictures measure none
    assert after == before
    assert json.loads((checkpoint / "expert.json").read_text())["calibration"] == fitted
    said = capsys.readouterr().out
    assert json.loads(said.partition(": ")[2]) == fitted
    assert asdict(Detector.from_folder(checkpoint).expert.config.calibration) == fitted
    assert looktwice(["train", "calibrate", str(mine), "--calibrate-on", str(mine)]) == 2
    assert f"{mine} holds no config.json" in capsys.readouterr().err

    broken = mine / "test" / "good" / "0.png"
    broken.write_bytes(b"not a picture")
    assert looktwice(asked) == 1
    assert f"looktwice: {broken}: cannot be read as a picture\n" in capsys.readouterr().err
    assert json.loads((checkpoint / "expert.json").read_text())["calibration"] == fitted

    (checkpoint / "config.json").write_text("{")
    assert looktwice(asked) == 2
    assert f"{checkpoint / 'config.json'} is no JSON: " in capsys.readouterr().err
    (checkpoint / "config.json").write_text("[]")
    assert looktwice(asked) == 2
    assert f"{checkpoint / 'config.json'} has no section anomaly_expert" in capsys.readouterr().err


def test_a_calibration_that_is_interrupted_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    checkpoint = tmp_path / "nano"
    shutil.copytree(NANO, checkpoint)
    files = [checkpoint / "config.json", checkpoint / "expert.json"]
    before = [path.read_bytes() for path in files]
    mine = write_set(tmp_path / "mine")
    write_text = Path.write_text

    def full_disk(path, text, *args, **options):
        write_text(path, text[: len(text) // 2], *args, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert looktwice(["train", "calibrate", str(checkpoint), "--calibrate-on", str(mine)]) != 0
    assert [path.read_bytes() for path in files] == before
    assert not list(checkpoint.glob("*.draft"))


def test_what_cannot_train_or_calibrate_is_refused_before_training(sets, tmp_path, capsys):
    plates = sets[0]
    good = write_set(tmp_path / "even")
    shutil.rmtree(good / "test" / "square")
    family = tmp_path / "family"
    shutil.copytree(plates, family / "cup")
    shutil.copytree(good, family / "lid")
    for options, complaint in (
        (["--data", plates, "--calibrate-on", plates], "trains on its test pictures too"),
        (["--data", family, "--calibrate-on", family / "cup"], "trains on its test pictures too"),
        (["--data", family], f"{family}: lid has no defective pictures"),
        (["--calibrate-on", good], f"{good}: it has no defective test pictures"),
        (["--calibrate-on", tmp_path / "even" / "train"], "no known data set layout"),
    ):
        assert train(tmp_path / "out", *options) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sets_of_every_layout_train_and_calibrate(tmp_path, small_shards):
    rng = np.random.default_rng(0)
    for root in ("heads", "chests"):
        for kind in ("yes", "no"):
            (tmp_path / root / kind).mkdir(parents=True)
            for number in range(3):
                picture = rng.integers(0, 256, (64, 64), np.uint8)
                Image.fromarray(picture).save(tmp_path / root / kind / f"{number}.png")
    options = ["--data", tmp_path / "heads", "--calibrate-on", tmp_path / "chests"]
    assert train(tmp_path / "out", *options) == 0


def test_held_out_kinds_never_train_and_are_judged(tmp_path, small_shards):
    assert train(tmp_path, "--hold-out", "lesion", "--hold-out", "dead_area", "--soft-labels") == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert not {"lesion", "dead_area"} & set(record["kinds"])
    assert record["soft"] is True
    assert [(plan.folder.name, plan.whole) for plan in small_shards] == [
        ("features", False),
        ("held_out", True),
    ]
    figures = json.loads((tmp_path / "held_out.json").read_text())
    assert figures.pop("kinds") == ["lesion", "dead_area"]
    assert set(figures) == {"image_auroc_of_head", "image_auroc_of_peak", "token_auroc"}
    assert all(0 <= value <= 1 for value in figures.values())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--leave-out", "plates"], "--leave-out plates: no such set"),
        (["--hold-out", "mystery"], "'mystery' is not one of"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, options, complaint):
    assert train(tmp_path, *options) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_a_finished_run_is_not_trained_over(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").touch()
    assert train(tmp_path) == 2
    assert "--resume goes on with it" in capsys.readouterr().err


def test_features_of_another_plan_are_not_taken(tmp_path):
    plan = ShardPlan(tmp_path, lite0_weights())
    make_shards(plan, 0, 1)
    make_shards(plan, 0, 1)
    with pytest.raises(
        ValueError, match=r"made with different settings \(seed\); choose another --out"
    ):
        make_shards(replace(plan, seed=1), 0, 1)


def test_pairs_of_a_data_set_carry_its_masks_and_nan_where_it_has_none(sets, tmp_path):
    unmarked = write_set(tmp_path / "unmarked", masks=False)
    for folder, known in ((sets[0], True), (unmarked, False)):
        plan = ShardPlan(tmp_path / folder.name, lite0_weights(), data=(folder,), real=1.0, pairs=1)
        plan.folder.mkdir(exist_ok=True)
        shard = read_shard(make_shard(plan, 0))
        normal, defective = (shard.images([image]).masks for image in (0, 1))
        assert (normal == 0).all()
        assert bool((defective > 0.5).any()) == known
        assert bool(defective.isnan().all()) != known


@pytest.mark.parametrize("whole", [False, True])
def test_held_out_pictures_keep_all_crops_and_training_pictures_three(tmp_path, whole):
    plan = ShardPlan(tmp_path, None, pairs=4, whole=whole)
    shard = read_shard(make_shard(plan, 0))
    if whole:  # nothing but the scenes is drawn then, so that they can be drawn again
        rng, library = np.random.default_rng([plan.seed, 0]), PictureLibrary()
        pairs = [draw_pair(rng, library, [], plan.kinds) for _ in range(plan.pairs)]
        sizes = [len(plan.anyres.crops(picture)) for pair in pairs for picture, _ in pair]
        assert shard.crops_per_image == sizes
        assert max(sizes) > 3
    else:
        assert max(shard.crops_per_image) == 3


def test_soft_labels_are_fainter_than_masks(tmp_path):
    made = []
    for soft in (False, True):
        plan = ShardPlan(
            tmp_path / str(soft), lite0_weights(), kinds=("stain",), pairs=2, soft=soft
        )
        plan.folder.mkdir()
        made.append(read_shard(make_shard(plan, 0)))
    hard, soft = (shard.masks.float() for shard in made)
    assert torch.equal(made[0].tokens[0], made[1].tokens[0])
    assert (soft <= hard + 1e-3).all()
    assert soft.sum() < hard.sum()
